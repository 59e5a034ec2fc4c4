"""The identity card of a saved model: what it must still be, and still compute, wherever it is loaded.

`identity.json` holds the fields that decide the numbers (see `fields`), the ids of fixed texts, the hash of the weights
and where they come from; `golden.safetensors` holds fixed pictures as pixels and the embeddings of both. `load`
compares them once and remembers the verdict in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.folders import cache_root
from mmpretrain.identity.fields import differences, fields, options, sha256
from mmpretrain.identity.golden import PIXELS, TEXTS, Golden, disagreement, golden_outputs, other_vectors
from mmpretrain.whole_file import replaced, write_whole

if TYPE_CHECKING:
    from mmpretrain.model import MultimodalModel
    from mmpretrain.pretrained import Pretrained

FORMAT = 1
CARD, VECTORS = "identity.json", "golden.safetensors"
WEIGHTS = "model.safetensors"
MAX_BYTES = {CARD: 2**22, VECTORS: 2**26}
SHOWN = 6  # fields an error lists
VERDICTS = 1000  # empty files that are kept


class Card(NamedTuple):
    """A card as it was written: the fields, hashes of weights and vectors, versions, and the golden outputs."""

    source: str
    fields: dict[str, Any]
    weights: str
    versions: dict[str, str]
    golden: Golden


def write_card(
    folder: Path, parts: Pretrained, config: Mapping[str, Any], source: str, model: MultimodalModel | None = None
) -> None:
    """Write the card of the model folder `folder`, whose parts on the CPU are `parts`, built by `config`.

    `model` is what the folder was saved from: `InputError` where it lies on the CPU in float32 and makes other
    embeddings. In half precision or on another device it computes otherwise, and is not compared. `InputError` too for
    golden outputs that are not finite.
    """
    from safetensors.torch import save

    made = golden_outputs(parts)
    if broken := [name for name, tensor in made.tensors.items() if not tensor.isfinite().all()]:
        raise InputError(
            f"the model makes NaN or infinity of the golden inputs ({', '.join(broken)}); nothing could be verified; "
            "save weights from before it broke"
        )
    if model is not None and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters()):
        wrong = other_vectors(made, parts._replace(model=model))
        if wrong is not None:
            raise InputError(
                f"the config builds another model than the one to save (here the card is the config's): {wrong}; give "
                "the options that the model was built with"
            )
    vectors = save(made.tensors)
    content = {
        "format": FORMAT,
        "source": source,
        "fields": fields(config, parts, folder),
        "weights": sha256(folder / WEIGHTS),
        "golden": {"texts": list(TEXTS), "ids": made.ids, "missing": made.missing},
        "vectors": hashlib.sha256(vectors).hexdigest(),
        "versions": versions(),
    }
    with replaced(folder / VECTORS) as temporary:
        temporary.write_bytes(vectors)
    write_whole(folder / CARD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_card(folder: Path) -> Card | None:
    """Read the card of a model folder; None for one written before there were cards. Raises `InputError`."""
    if not (folder / CARD).is_file():
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = json.loads(_bytes(folder / CARD))
        if content["format"] != FORMAT:
            raise InputError(
                f"{folder / CARD} has the format {content['format']!r:.40}, this version of mmpretrain reads {FORMAT}; "
                "install the version that wrote it"
            )
        vectors = _bytes(folder / VECTORS)
        if hashlib.sha256(vectors).hexdigest() != content["vectors"]:
            raise InputError(f"{folder / VECTORS} is not the file that {CARD} was written with; restore both")
        tensors: dict[str, Tensor] = load(vectors)
        ids, missing = content["golden"]["ids"], content["golden"]["missing"]
        if content["golden"]["texts"] != list(TEXTS):  # other texts need another format
            raise ValueError("the golden texts are others")
        for name in ("image", "text"):
            inputs = [pixels in tensors for pixels in PIXELS] if name == "image" else [ids is not None]
            if len({f"{name}.embeddings" in tensors, *inputs}) > 1:
                raise ValueError(f"the golden outputs of {name} are incomplete")
        if ids is not None and (len(ids) != len(TEXTS) or not all(isinstance(row, list) for row in ids)):
            raise ValueError("the golden ids are no lists")
        return Card(
            str(content["source"]),
            dict(content["fields"]),
            str(content["weights"]),
            {str(name): str(version) for name, version in content["versions"].items()},
            Golden(ids, tensors, dict(missing)),
        )
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder / CARD} is no identity card ({type(error).__name__}: {error!s:.200})") from error


def verify(folder: Path, parts: Pretrained, config: Mapping[str, Any], again: bool = False) -> bool:
    """Compare a model folder, whose parts on the CPU are `parts`, with its card; returns whether there is one.

    Fields are compared always, hashes and golden outputs where the same files were not found right before by the same
    versions on this machine, or `again`. Raises `InputError` naming what disagrees.
    """
    card = read_card(folder)
    if card is None:
        return False
    found = differences(card.fields, fields(config, parts, folder))
    if found:
        _refuse(folder, "; ".join(found[:SHOWN]) + ("; and more" if len(found) > SHOWN else ""))
    verdict = _verdict(folder)
    if not again and verdict.exists():
        return True
    if sha256(folder / WEIGHTS) != card.weights:
        _refuse(folder, f"weights: {WEIGHTS} is not the file whose SHA-256 the card has")
    wrong = disagreement(card.golden, parts)
    if wrong is not None:
        here = versions()
        other = [f"{n} {there} there, {here.get(n)} here" for n, there in card.versions.items() if here.get(n) != there]
        _refuse(folder, wrong + (f" (written with {', '.join(other)})" if other else ""))
    try:
        verdict.parent.mkdir(parents=True, exist_ok=True)
        verdict.touch()
        for old in sorted(verdict.parent.iterdir(), key=lambda file: file.stat().st_mtime)[:-VERDICTS]:
            old.unlink(missing_ok=True)
    except OSError:  # nowhere to remember it: the next load verifies again
        pass
    return True


def changed_options(folder: Path, config: Mapping[str, Any]) -> str:
    """Say which options of the config are not the card's, to explain why weights do not fit; "" where none or no card.

    Only the config is needed, nothing built.
    """
    try:
        card = read_card(folder)
    except InputError:
        return ""
    now = {name: value for part, described in config.items() for name, value in options(described, part)}
    found = [] if card is None else differences(card.fields, now)
    return f"; the config was changed: {'; '.join(found[:SHOWN])}" if found else ""


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    import PIL
    import timm
    import tokenizers

    from mmpretrain import __version__

    return {
        "mmpretrain": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "tokenizers": tokenizers.__version__,
        "pillow": PIL.__version__,
    }


def _refuse(folder: Path, what: str) -> None:
    raise InputError(
        f"{folder} is not what its identity card says: {what}. Use the folder as it was saved; if the change is meant, "
        f"`mmpretrain card {folder}` writes a new card"
    )


def _verdict(folder: Path) -> Path:
    """Where it is remembered that exactly these files were found right, by these versions.

    Small files count by what is in them, the weights by size and times, which no copy keeps: reading them would cost
    as much as loading them.
    """
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for name in (CARD, VECTORS, "config.yaml", "tokenizer.json"):
        file = folder / name
        digest.update(f"{name} {sha256(file) if file.is_file() else None} ".encode())
    found = (folder / WEIGHTS).stat()
    digest.update(f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}".encode())
    return cache_root() / "verified" / digest.hexdigest()


def _bytes(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > MAX_BYTES[file.name]:
            raise InputError(f"{file} has {size} bytes, over the limit of {MAX_BYTES[file.name]}; it is no model's")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); the folder is incomplete") from error
