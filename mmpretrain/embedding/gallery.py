"""Answers of a search as one HTML page that needs nothing else: small pictures, or texts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mmpretrain.data.decode import Image
from mmpretrain.embedding.index import Hit
from mmpretrain.embedding.parts import Manifest
from mmpretrain.embedding.run import PICTURE_FIELDS
from mmpretrain.embedding.sources import Source, open_source
from mmpretrain.whole_file import write_whole

SIDE = 256  # pixels of the longest side


def write_gallery(target: Path, query: str, hits: Sequence[Hit], manifest: Manifest) -> None:
    """Write the page; an answer whose picture is gone by now is shown without it."""
    pictures: list[str | None] = [None] * len(hits)
    if manifest.modality == "image":
        with suppress(OSError, ValueError):  # the whole source is gone
            source = open_source(manifest.source, False, manifest.column, manifest.key_column)
            pictures = [_picture(source, hit) for hit in hits]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names and texts come from strangers
        undefined=StrictUndefined,
    )
    page = environment.get_template("gallery.html.j2").render(
        query=query, shown=list(zip(hits, pictures, strict=True)), source=manifest.source
    )
    write_whole(target, page)


def _picture(source: Source, hit: Hit) -> str | None:
    """Return the picture of an answer; None where it is gone, or where others came or went since."""
    try:
        if source.key(hit.item) != hit.key:
            return None
        return _small({"__key__": hit.key, **source.read(hit.item)})
    except (OSError, ValueError, IndexError):
        return None


def _small(sample: dict[str, Any]) -> str:
    """Return a small copy of a sample's picture as a data address."""
    from mmpretrain.data.pixels import to_rgb

    image = to_rgb(Image(transform=lambda image, generator: NotImplemented, extensions=PICTURE_FIELDS).open(sample))
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
