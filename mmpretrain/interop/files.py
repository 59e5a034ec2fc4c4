"""Tensors out of files of other libraries, without running anything that is in them.

What a file is shows its content, not its name: safetensors, a checkpoint of `torch.save` (a zip), a TorchScript archive
(a zip too), or the index of a model in several such files. Any other pickle is refused: reading it would run its code.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.interop.torchscript import read_torchscript

HUGGINGFACE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
NAMES = (*OPEN_CLIP, *HUGGINGFACE)
"""What the weights of a folder may be called, the first that is there is taken: safetensors before pickles."""
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys of a checkpoint under which trainers keep the weights, beside optimizer and step; only one may be there."""
PREFIXES = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before every name."""
MOST_INDEX = 2**26
"""Bytes of an index: a million names."""
ADVICE = "save the weights with safetensors.torch.save_file, or as a plain dictionary of tensors with torch.save"


def read_tensors(path: str | Path, names: Sequence[str] = NAMES) -> dict[str, Tensor]:
    """Read name -> tensor from a file, from all files of an index, or from the weights file of a folder.

    `names`: what that file may be called, best first; some folders hold the same model for two libraries.

    Tensors stay as they are saved (half precision too). Weights wrapped by a trainer ({"state_dict": ...}, names that
    begin with `module.`) are unwrapped. Raises `InputError` for a format that is not read, for what is damaged, for a
    checkpoint with several sets of weights (a moving average, say), and for a pickle that wants to run code.
    """
    return _without_prefixes(_read(weights_file(Path(path), names)))


def _read(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as opened:
        start = opened.read(9)
    if file.name.endswith(".index.json"):
        return _read_index(file)
    if start[:4] == b"PK\x03\x04":
        return _read_zip(file)
    if start[8:9] == b"{":  # behind the header's length, 8 bytes
        return _read_safetensors(file)
    if start[:1] == b"\x80":
        raise InputError(f"{file} is a plain pickle, which can run any code when it is read: refused; {ADVICE}")
    raise InputError(
        f"{file} is no file of weights that is read; expected safetensors, a checkpoint of torch.save "
        "(since PyTorch 1.6), a TorchScript archive, or model.safetensors.index.json"
    )


def weights_file(path: Path, names: Sequence[str] = NAMES) -> Path:
    """Return `path`, or the first of `names` inside where it is a folder; raises `InputError` where there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path} does not exist; expected a file of weights or a folder with one")
    for name in names:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path} holds no weights: none of {', '.join(names)}; give the file itself")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error


def read_places(path: Path) -> dict[str, str]:
    """Return name of a tensor -> file beside the index `path` that holds it; raises `InputError` for other content."""
    if path.stat().st_size > MOST_INDEX:
        raise InputError(f"{path} has {path.stat().st_size} bytes; an index has at most {MOST_INDEX}")
    try:
        places: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = set(places.values())
        beside = all(name == Path(name).name and name not in ("", ".", "..") for name in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no index of weights: no names with files under weight_map") from error
    if not beside or any(name.endswith(".index.json") for name in files):
        raise InputError(f"{path} names files that do not lie beside it; expected plain names such as {HUGGINGFACE[0]}")
    return places


def _read_index(path: Path) -> dict[str, Tensor]:
    places = read_places(path)
    files = sorted(set(places.values()))
    found: dict[str, Tensor] = {}
    for name in files:
        if not (path.parent / name).is_file():
            raise InputError(f"{path} names {name}, which is not there; fetch all {len(files)} files")
        here = _read(path.parent / name)
        wanted = {key for key, place in places.items() if place == name}
        if here.keys() != wanted:  # a second copy of a tensor, perhaps with other numbers, is wrong too
            wrong = sorted(here.keys() ^ wanted)
            raise InputError(
                f"{path} and {name} do not agree on {', '.join(wrong[:6])} ({len(wrong)} names in all): a file must "
                "hold what weight_map says, no less and no more; fetch the files again"
            )
        found |= here
    return found


def _read_zip(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # damaged names and sizes end in errors of any kind
        raise InputError(f"{path} is a damaged zip file: {error}; fetch it again") from error
    names = {member.filename.rpartition("/")[2] for member in members}
    if "constants.pkl" in names:
        return read_torchscript(path)
    if "data.pkl" not in names:
        raise InputError(f"{path} is a zip file without data.pkl, so no checkpoint of torch.save; {ADVICE}")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise InputError(f"{path} is compressed, as torch.save never writes; {ADVICE}")
    return _state_dict(_load(path), path)


def _load(path: Path) -> Any:
    """Read a checkpoint of tensors, numbers, strings and containers; mapped, so an optimizer beside costs no memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse tensors, which are refused afterwards
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", str(error))
        wanted = f"wants to use {found[1]}" if found else "holds more than tensors"
        raise InputError(f"{path} is a pickle that {wanted}, which could run code: refused; {ADVICE}") from error
    except Exception as error:  # of a damaged file: no base in common
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        content = _unwrapped(content, path)
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path} holds no dictionary of tensors but {type(content).__name__}; {ADVICE}")
    strange = [str(key) for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strange:
        raise InputError(f"{path} is no dictionary of tensors: {', '.join(strange[:6])} are something else; {ADVICE}")
    return {name: _plain(name, tensor, path) for name, tensor in content.items()}


def _unwrapped(content: Mapping[Any, Any], path: Path) -> Mapping[Any, Any]:
    """Return what lies under the one key of `WRAPPERS` that is there; which of several is meant nobody can know."""
    mappings = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
    inside = [key for key in mappings if _bare_names(content[key])] or mappings[:1]
    if not inside:
        return content
    names = _bare_names(content[inside[0]])
    # Under any key: `state_dict_ema` and the like hold the same names.
    twins = [
        str(key) for key, value in content.items() if key != inside[0] and not names.isdisjoint(_bare_names(value))
    ]
    several = [*inside, *(key for key in twins if key not in inside)]
    if len(several) > 1:
        raise InputError(
            f"{path} holds several sets of weights: {', '.join(several)}; save the one that is meant alone, as a "
            "dictionary of tensors"
        )
    found: Mapping[Any, Any] = content[inside[0]]
    return found


def _bare_names(content: Any) -> set[str]:
    """Return the names of the tensors in a mapping, without what DDP and torch.compile put before them."""
    if not isinstance(content, Mapping):
        return set()
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return set(_without_prefixes(tensors))


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove what stands before every name, in any order and as often as it is there."""
    while tensors:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _plain(name: str, tensor: Tensor, path: Path) -> Tensor:
    """Return a dense tensor; one that claims more numbers than are saved would take any memory when it is copied."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{path}: {name} is no dense tensor of its own; expected plain weights; {ADVICE}")
    return tensor.detach()
