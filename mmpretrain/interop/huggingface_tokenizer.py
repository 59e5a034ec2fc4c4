"""transformers' tokenizer files of CLIP and SigLIP as our tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mmpretrain.errors import InputError
from mmpretrain.interop.huggingface_config import Config, read_json
from mmpretrain.interop.tokenizer_in import huggingface_tokenizer, special_tokens

SETTINGS = "tokenizer_config.json"
CLEANING = {"SiglipTokenizer": "unpunctuated", "Siglip2Tokenizer": "lowercase"}
"""What a `tokenizer_class` does to a text that need not be in tokenizer.json."""
CLASSES = {"siglip2": "Siglip2Tokenizer"}
"""Models whose tokenizer transformers takes by their `model_type`, whatever class their files name."""


class Texts(NamedTuple):
    """How a model takes texts: the config of our tokenizer, and the id that ends a text."""

    tokenizer: Config
    eos_id: int


def read_tokenizer(folder: Path, model_type: str, context_length: int) -> Texts:
    """Read tokenizer.json, and tokenizer_config.json where there is one.

    Raises `InputError` where there is no tokenizer.json, for what it puts around a text that ours cannot, and for
    padding on the left.
    """
    settings: dict[str, Any] = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    if settings.get("padding_side", "right") != "right":
        raise InputError(f"{folder / SETTINGS}: padding_side is {settings['padding_side']!r}; texts are padded right")
    named = CLASSES.get(model_type) or str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    clean = CLEANING.get(named, "none")
    if clean == "unpunctuated" and settings.get("do_lower_case") is False:
        raise InputError(f"{folder / SETTINGS}: do_lower_case=false; such texts are always cleaned to lower case here")
    pad = "longest" if model_type == "clip" else "context_length"  # SigLIP reads padding as text
    found = huggingface_tokenizer(folder, context_length, clean, pad=pad)
    return Texts(found, special_tokens(folder).end_id)
