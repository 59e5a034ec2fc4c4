"""transformers' tokenizer files of CLIP and SigLIP as our tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from mmpretrain.errors import InputError
from mmpretrain.interop.huggingface_config import Config, read_json
from mmpretrain.interop.huggingface_fields import section
from mmpretrain.interop.huggingface_tokenizer_out import clip_steps
from mmpretrain.interop.tokenizer_in import FILE, huggingface_tokenizer, special_tokens

SETTINGS = "tokenizer_config.json"
CLEANING = {"SiglipTokenizer": "unpunctuated", "Siglip2Tokenizer": "lowercase"}
"""What a `tokenizer_class` does to a text that need not be in tokenizer.json."""
CLASSES = {"siglip2": "Siglip2Tokenizer"}
"""Models whose tokenizer transformers takes by their `model_type`, whatever class their files name."""
UNNAMED = {"clip": "CLIPTokenizer", "siglip": "SiglipTokenizer"}
"""The class that transformers takes where the files name none."""

PROBES = (
    "A Cat's 2nd HAT, isn't  it?\n#1 über-groß",
    "Cafe\u0301 naïve ½ ² Ⅷ ＦＵＬＬ İstanbul",
    "日本語 привет 😀🚲 _x_ they'll we've I'd 3.14 \t ...",
    "“quotes” &amp; ﬁ \u200b\u00a0end",
)
"""Texts that show how words are cleaned and split."""


class Texts(NamedTuple):
    """How a model takes texts: the config of our tokenizer, and the id that ends a text."""

    tokenizer: Config
    eos_id: int


def read_tokenizer(folder: Path, model_type: str, context_length: int) -> Texts:
    """Read tokenizer.json, and tokenizer_config.json where there is one.

    Raises `InputError` where there is no tokenizer.json, for what it puts around a text that ours cannot, for padding
    or cutting on the left, and where transformers would give other ids than tokenizer.json alone.
    """
    settings: dict[str, Any] = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    for side, done in (("padding_side", "padded"), ("truncation_side", "cut")):
        if settings.get(side, "right") != "right":
            raise InputError(f"{folder / SETTINGS}: {side} is {settings[side]!r}; texts are {done} right")
    named = CLASSES.get(model_type) or str(settings.get("tokenizer_class") or UNNAMED[model_type]).removesuffix("Fast")
    clean = CLEANING.get(named, "none")
    if clean == "unpunctuated" and settings.get("do_lower_case") is False:
        raise InputError(f"{folder / SETTINGS}: do_lower_case=false; such texts are always cleaned to lower case here")
    pad = "longest" if model_type == "clip" else "context_length"  # SigLIP reads padding as text
    found = huggingface_tokenizer(folder, context_length, clean, pad=pad)
    texts = Texts(found, special_tokens(folder).end_id)
    _check_file(folder, settings, named)
    return texts


def _check_file(folder: Path, settings: Mapping[str, Any], named: str) -> None:
    """See that tokenizer.json alone gives the ids that transformers gives for the whole folder."""
    made = tokenizers.Tokenizer.from_file(str(folder / FILE))
    added = {str(i): token.content for i, token in made.get_added_tokens_decoder().items()}
    listed = section(settings, "added_tokens_decoder", str(folder / SETTINGS))
    for i, token in listed.items():
        content = token.get("content") if isinstance(token, Mapping) else token
        special = isinstance(token, Mapping) and token.get("special")
        known = made.id_to_token(int(i)) if special and i.isdecimal() and len(i) < 10 else None
        if content not in (added.get(i), known):
            raise InputError(
                f"{folder / SETTINGS}: added_tokens_decoder gives the id {i} to {content!r}, which {FILE} does not; "
                "save the tokenizer again with save_pretrained of transformers"
            )
    if named == "CLIPTokenizer":
        normalizer, splitter = clip_steps()
        ours = [_words(normalizer, splitter, text) for text in PROBES]
        if [_words(made.normalizer, made.pre_tokenizer, text) for text in PROBES] != ours:
            raise InputError(
                f"{folder / FILE} cleans or splits texts in another way than CLIPTokenizer, which transformers takes "
                f"whatever the file says; save it again with save_pretrained, or change tokenizer_class in {SETTINGS}"
            )


def _words(normalizer: Any, splitter: Any, text: str) -> list[str]:
    """Split a text as a tokenizer.json does, which may lack either step."""
    cleaned = text if normalizer is None else normalizer.normalize_str(text)
    return [cleaned] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(cleaned)]
