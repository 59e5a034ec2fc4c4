"""Weights of open_clip's CLIP and CoCa under our names, by the tables of the importer.

Every operation of a table is linear, so the same tables carry gradients from one side to the other.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmpretrain.interop.names import Entry, to_ours
from mmpretrain.interop.open_clip_names import (
    DECODER,
    PATCHES,
    SCALARS,
    VIT,
    shared_pool,
    text,
    text_projection,
    vit_norm,
)

CLIP: list[Entry] = [*VIT, *PATCHES, *vit_norm(), *text(), *text_projection(), *SCALARS]


def coca(same_width: bool) -> list[Entry]:
    """Return the table of CoCa; `same_width`: its image tokens are as wide as what the pooler makes of them."""
    written = [*text("text."), *text_projection("text.")]
    return [*VIT, *PATCHES, *shared_pool(same_width), *written, *DECODER, *SCALARS]


def converted(theirs: Mapping[str, Tensor], table: list[Entry]) -> dict[str, Tensor]:
    """Return open_clip's tensors under our names; raises `InputError` for one that no entry takes."""
    return to_ours(theirs, table, "open_clip's model")
