"""What a frozen encoder gives for a text never changes: in training it is computed once for each text, and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmpretrain.errors import InputError
from mmpretrain.model import MultimodalModel
from mmpretrain.types import Encoded

ROWS = 200_000
"""Texts kept at most; the one that was asked for longest ago is forgotten first."""
PIECE = 32
"""Rows that are computed at once; a piece that lacks some repeats its first."""


def remember_frozen(model: MultimodalModel, rows: int = ROWS) -> None:
    """Let every frozen encoder of `model` keep its pooled outputs of ids while it trains; nothing changes elsewhere.

    Raises `InputError` where no encoder is frozen, and for a model with fusion, which reads tokens.
    """
    if not model.frozen:
        raise InputError("finetune.remember keeps what frozen encoders give, none is; set finetune.freeze=[text]")
    if model.fusion is not None:
        raise InputError("finetune.remember keeps pooled outputs, a fusion reads tokens; set finetune.remember=false")
    for name in model.frozen:
        model.encoders[name].forward = _Remembering(model.encoders[name], rows)


def remembers(model: MultimodalModel) -> bool:
    """Whether an encoder of `model` keeps what it gives."""
    return any(isinstance(encoder.__dict__.get("forward"), _Remembering) for encoder in model.encoders.values())


class _Remembering:
    """An encoder's `forward` that knows earlier rows; it stands in the encoder's own attributes, where torch looks.

    New rows are computed in pieces of one shape, which depends on nothing but a row's own length, so that the result
    does not depend on the batch a row first came in: a run that is resumed goes on with the same numbers.
    """

    def __init__(self, encoder: nn.Module, rows: int) -> None:
        self.encoder, self.plain, self.rows = encoder, type(encoder).forward, rows
        # An encoder that skips padding computes as much as its rows together have: alone, a row is of one shape.
        self.piece = 1 if getattr(encoder, "skips_padding", False) else PIECE
        self.known: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def __call__(self, values: Tensor, mask: Tensor | None = None, *lengths: Any) -> Encoded:
        ids = values.ndim == 2 and not values.is_floating_point()
        if not (ids and torch.is_grad_enabled()):  # evaluation, whose texts are seen once
            return self.plain(self.encoder, values, mask, *lengths)  # type: ignore[no-any-return]
        real = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        rows = list(zip(values.cpu(), real.cpu(), strict=True))  # at once: each row asked for alone would wait
        keys = [(*row[kept].tolist(),) for row, kept in rows]
        given = dict(zip(keys, rows, strict=True))
        shapes: dict[int, list[tuple[int, ...]]] = {}
        for key in given:
            if key not in self.known:
                length = self._length(given[key][1])
                shapes.setdefault(length, []).append(key)
        for length, new in shapes.items():
            for start in range(0, len(new), self.piece):
                self._compute(length, new[start : start + self.piece], given, values.device)
        pooled = torch.stack([self.known[key] for key in keys])
        for key in given:
            self.known.move_to_end(key)
        while len(self.known) > self.rows:
            self.known.popitem(last=False)
        return Encoded(pooled, pooled[:, None], None)

    def _length(self, real: Tensor) -> int:
        """How many positions of a row are computed: those that are real, rounded up to a multiple of 8."""
        if getattr(self.encoder, "reads_padding", False):
            return len(real)
        last = int(real.nonzero()[-1]) + 1 if bool(real.any()) else 1
        longest = getattr(self.encoder, "context_length", len(real))
        return int(min(-(-last // 8) * 8, longest))

    @torch.no_grad()
    def _compute(
        self, length: int, new: list[tuple[int, ...]], given: Mapping[tuple[int, ...], Any], device: torch.device
    ) -> None:
        rows = [*new, *[new[0]] * (self.piece - len(new))]
        values, real = (torch.stack([_fitted(given[key][part], length) for key in rows]).to(device) for part in (0, 1))
        # Exact, and quicker: autocast would convert all frozen weights again for each piece.
        with torch.autocast(values.device.type, enabled=False):
            pooled = self.plain(self.encoder, values, real).pooled
        self.known |= {key: row.clone() for key, row in zip(new, pooled[: len(new)], strict=True)}


def _fitted(row: Tensor, length: int) -> Tensor:
    """Cut or pad a row (L,) to `length`; what is cut is padding."""
    return nn.functional.pad(row[:length], (0, max(0, length - len(row))))
