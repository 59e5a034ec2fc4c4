"""Models that are published elsewhere, by name: fetched, and converted once into a model folder in our cache.

    open_clip:ViT-B-32/laion2b_s34b_b79k    a name and a tag of open_clip's own table (the package must be installed)
    openai:ViT-B/32                         one of OpenAI's nine, from where OpenAI publishes them, checked by SHA-256
    hf-hub:org/name, hf-hub:org/name@rev    a repository of the Hugging Face hub: ours, open_clip's or transformers'
    package:import_name                     a sentence encoder that an installed package holds; nothing is fetched

Converted models lie in `models/` of $MMPRETRAIN_CACHE, else of ~/.cache/mmpretrain; remove one there to fetch it anew.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mmpretrain.errors import InputError
from mmpretrain.folders import cache_root
from mmpretrain.interop.converted import Converted, write
from mmpretrain.interop.fetch import hub_file, hub_folder, hub_list, tensors_at
from mmpretrain.interop.files import HUGGINGFACE, OPEN_CLIP, read_places, read_tensors
from mmpretrain.pretrained import CONFIG, WEIGHTS

OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
OPENAI = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}
"""OpenAI's name -> SHA-256 of the file, and its name there."""

REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")
SMALL = (".json", ".yaml", ".txt", ".model", ".md")
"""Endings of what is fetched beside the weights."""


def resolve(name: str) -> Path:
    """Return the model folder of a published model; fetched and converted if it is not in the cache yet.

    Raises `InputError` for an unknown name, a missing package, a failed download and weights that do not convert.
    """
    folder = _folder(name)
    if not (folder / CONFIG).is_file():
        if folder.exists():
            raise InputError(f"{folder} is damaged: it has no {CONFIG}; remove it, and {name} is fetched anew")
        made = fetch(name)
        if isinstance(made, Path):  # a model folder of ours, which lies in the hub's own cache
            return made
        _keep(made, folder)
    return folder


def fetch(name: str) -> Converted | Path:
    """Fetch a published model: in our terms, or the folder where it is one of ours already; raises as `resolve`."""
    kind, _, target = name.partition(":")
    if kind == "open_clip" and target.startswith("hf-hub:"):
        return _from_open_clip_repository(_repository(target.partition(":")[2]))
    kinds: dict[str, Callable[[str], Converted | Path]] = {
        "open_clip": _from_open_clip,
        "openai": _from_openai,
        "hf-hub": _from_hub,
        "package": _from_package,
    }
    if kind not in kinds or not target:
        raise InputError(f"{name!r} names no published model; expected {', '.join(f'{k}:NAME' for k in kinds)}")
    return kinds[kind](target)


def _folder(name: str) -> Path:
    from mmpretrain import __version__

    cache = cache_root() / "models" / __version__
    # The name for people, the digest because several names look alike without their punctuation.
    readable = re.sub(r"[^\w.-]+", "-", name)
    return cache / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _keep(made: Converted, folder: Path) -> None:
    """Write the model folder under its final name in one step, or leave the one that another process just wrote."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        written = write(made, Path(temporary) / "model")
        try:
            written.rename(folder)
        except OSError:
            if not (folder / CONFIG).is_file():
                raise


def _from_openai(target: str) -> Converted:
    from mmpretrain.interop.openai import from_state_dict

    if target not in OPENAI:
        raise InputError(f"OpenAI published no CLIP called {target!r}{_near(target, OPENAI)}")
    digest = OPENAI[target].partition("/")[0]
    return from_state_dict(tensors_at(f"{OPENAI_URL}/{OPENAI[target]}", digest), f"openai:{target}")


def _from_package(target: str) -> Converted:
    from mmpretrain.interop.sentence_encoder import from_package

    return from_package(target)


def _from_open_clip(target: str) -> Converted:
    """Convert NAME/TAG; its tag also says the pixels' mean and std, and the activation it was trained with."""
    from mmpretrain.interop import open_clip_in

    if target.replace("/", "-") in open_clip_in.config_files():
        raise InputError(
            f"open_clip:{target} is a model without weights; give open_clip:{target}/TAG with one of its tags "
            f"(open_clip.list_pretrained), or a file: mmpretrain convert open_clip:{target} --weights FILE OUT"
        )
    config, known = open_clip_in.packaged(target)
    place = known or {}
    if place.get("hf_hub"):
        repository, _, file = str(place["hf_hub"]).rpartition("/")
        weights = read_tensors(hub_file(repository, _alternatives(file)))
    elif place.get("url"):
        digest = re.search(r"-([0-9a-f]{8,64})\.\w+$", str(place["url"]))  # releases have its beginning in their name
        weights = tensors_at(str(place["url"]), digest[1] if digest else "")
    else:
        raise InputError(f"open_clip's table does not say where {target} is; fetch the weights and convert the file")
    return open_clip_in.from_config(config, weights, known, None, f"open_clip:{target}")


def _alternatives(file: str) -> Sequence[str]:
    """Return what the weights of a repository may be called: safetensors before the pickle that is named."""
    if not file:
        return OPEN_CLIP
    return (f"{Path(file).stem}.safetensors", file) if file.endswith((".bin", ".pth")) else (file,)


class _Repository(NamedTuple):
    """A repository of the hub: its name, the revision that was asked for, and its files at the top."""

    name: str
    revision: str | None
    files: set[str]


def _repository(target: str) -> _Repository:
    match = REPOSITORY.fullmatch(target)
    if match is None:
        raise InputError(f"hf-hub:{target} names no repository; expected hf-hub:org/name or hf-hub:org/name@revision")
    return _Repository(match[1], match[2], {name for name in hub_list(match[1], match[2]) if "/" not in name})


def _from_hub(target: str) -> Converted | Path:
    """Convert a repository by the files it has; a model folder of ours is taken as it is."""
    from mmpretrain.interop.huggingface_in import from_folder

    found = _repository(target)
    if {CONFIG, WEIGHTS} <= found.files:
        from mmpretrain.hub import download

        return download(found.name, found.revision)
    if "open_clip_config.json" in found.files:
        return _from_open_clip_repository(found)
    if "config.json" not in found.files:
        raise InputError(f"hf-hub:{target} has no {CONFIG}, open_clip_config.json or config.json, so no model we know")
    folder = _with_weights(found, HUGGINGFACE)
    return from_folder(folder)._replace(source=f"hf-hub:{found.name}@{folder.name}")


def _from_open_clip_repository(found: _Repository) -> Converted:
    from mmpretrain.interop.open_clip_in import from_name

    folder = _with_weights(found, OPEN_CLIP)
    made = from_name(str(folder), next(folder / name for name in OPEN_CLIP if name in found.files))
    return made._replace(source=f"hf-hub:{found.name}@{folder.name}")


def _with_weights(found: _Repository, names: Sequence[str]) -> Path:
    """Fetch the small files and the weights of a repository; returns the folder, which is named by the commit."""
    weights = next((name for name in names if name in found.files), None)
    if weights is None:
        raise InputError(f"hf-hub:{found.name} has no weights: none of {', '.join(names)}")
    if not weights.endswith((".safetensors", ".safetensors.index.json")):
        raise InputError(
            f"hf-hub:{found.name} has its weights in a pickle only ({weights}), which is not fetched from the hub; "
            "download the repository yourself and give the folder to `mmpretrain convert`"
        )
    wanted = {weights, *(name for name in found.files if name.endswith(SMALL))}
    if weights.endswith(".index.json"):
        wanted |= found.files & set(read_places(hub_file(found.name, [weights], found.revision)).values())
    return hub_folder(found.name, found.revision, sorted(wanted))


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else f"; there are {', '.join(list(known)[:12])}"
