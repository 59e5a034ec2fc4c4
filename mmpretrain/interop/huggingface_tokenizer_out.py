"""Our tokenizers as files that transformers' AutoTokenizer loads, with the same ids."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mmpretrain.data.tokenizer import (
    BYTE_TO_CHARACTER,
    CLIP_MERGES,
    CLIP_VOCABULARY,
    ByteTokenizer,
    ClipTokenizer,
    HuggingFaceTokenizer,
    _clip,
)
from mmpretrain.errors import InputError
from mmpretrain.interop.huggingface_config import Config

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
"""How transformers spells CLIP's two special words."""
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
PUNCTUATION = r"[!-/:-@\[-`{-~]"
"""Python's `string.punctuation`."""
CLEANING: dict[str, list[normalizers.Normalizer]] = {
    "none": [],
    "lowercase": [normalizers.Lowercase()],
    "unpunctuated": [
        normalizers.Lowercase(),
        normalizers.Replace(Regex(PUNCTUATION), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ],
}
"""`clean` of a HuggingFaceTokenizer that a tokenizer.json can do; the others repair text (ftfy)."""


def write_tokenizer(tokenizer: Any, folder: Path, reads_padding: bool, cleans: bool = True) -> None:
    """Write tokenizer.json and tokenizer_config.json (and CLIP's vocab.json and merges.txt) into `folder`.

    CLIP's repairs of damaged and HTML text are no part of a tokenizer.json: for such texts ids differ, as they do
    between OpenAI's tokenizer and transformers'. `cleans`: the files must clean texts as the tokenizer
    does; False where the reader does. Raises `InputError` for a tokenizer that has no such form.
    """
    if isinstance(tokenizer, ClipTokenizer):
        made, settings = _clip_tokenizer(tokenizer, folder, reads_padding)
    elif isinstance(tokenizer, ByteTokenizer):
        made, settings = _byte_tokenizer()
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        made, settings = _from_file(tokenizer, cleans)
    else:
        raise InputError(
            f"a {type(tokenizer).__name__} has no tokenizer.json; use ClipTokenizer or HuggingFaceTokenizer"
        )
    made.save(str(folder / "tokenizer.json"))
    common = {"model_max_length": tokenizer.context_length, "padding_side": "right", "truncation_side": "right"}
    _write_json(folder / "tokenizer_config.json", {**settings, **common, "clean_up_tokenization_spaces": False})


def clip_steps() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """What transformers' CLIPTokenizer does to a text, whatever a tokenizer.json says."""
    cleaned = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    return cleaned, pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _clip_tokenizer(tokenizer: ClipTokenizer, folder: Path, reads_padding: bool) -> tuple[Tokenizer, Config]:
    if reads_padding and tokenizer.pad_id != tokenizer.eos_id:
        raise InputError(
            f"transformers' CLIPTokenizer cannot pad with the id {tokenizer.pad_id}, a word of its vocabulary, which "
            f"this text encoder reads; train with tokenizer.pad_id={tokenizer.eos_id}"
        )
    symbols, _ = _clip()
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols[:-2], CLIP_START, CLIP_END])}
    lines = gzip.decompress(CLIP_VOCABULARY.read_bytes()).decode("utf-8").split("\n")[1 : CLIP_MERGES + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    made = Tokenizer(
        models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=CLIP_END)
    )
    made.normalizer, made.pre_tokenizer = clip_steps()
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.RobertaProcessing(
        (CLIP_END, vocabulary[CLIP_END]),
        (CLIP_START, vocabulary[CLIP_START]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    made.add_special_tokens([CLIP_START, CLIP_END])
    names = {"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END, "pad_token": CLIP_END}
    return made, {"tokenizer_class": "CLIPTokenizer", **names}


def _byte_tokenizer() -> tuple[Tokenizer, Config]:
    names = {"pad_token": "<|pad|>", "bos_token": "<|start|>", "eos_token": "<|end|>"}
    characters = [chr(byte).translate(BYTE_TO_CHARACTER) for byte in range(256)]
    vocabulary = {symbol: i for i, symbol in enumerate([*names.values(), *characters])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=names["pad_token"]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex("."), behavior="isolated"),
        ]
    )
    made.decoder = decoders.ByteLevel()
    _surround(made, names["bos_token"], names["eos_token"])
    made.add_special_tokens(list(names.values()))
    return made, {"tokenizer_class": "PreTrainedTokenizerFast", **names}


def _from_file(tokenizer: HuggingFaceTokenizer, cleans: bool) -> tuple[Tokenizer, Config]:
    clean = tokenizer.clean if cleans else "none"
    if clean not in CLEANING or tokenizer.strip_sep_token:
        found = "strip_sep_token" if tokenizer.strip_sep_token else f"clean={tokenizer.clean}"
        raise InputError(f"a tokenizer.json cannot do {found} of HuggingFaceTokenizer, so its ids would be others")
    made = Tokenizer.from_str(tokenizer._tokenizer.to_str())
    if steps := CLEANING[clean]:
        made.normalizer = normalizers.Sequence(steps + ([] if made.normalizer is None else [made.normalizer]))
    start = None if tokenizer.start_id is None else made.id_to_token(tokenizer.start_id)
    end = str(made.id_to_token(tokenizer.eos_id))
    pad = made.id_to_token(tokenizer.pad_id)
    _surround(made, start, end)
    names = {"eos_token": end, "pad_token": pad, **({} if start is None else {"bos_token": start})}
    return made, {"tokenizer_class": "PreTrainedTokenizerFast", **names}


def _surround(made: Tokenizer, start: str | None, end: str) -> None:
    """Let the tokenizer put start and end around a text."""
    words = [word for word in (start, end) if word is not None]
    template = [*([] if start is None else [start]), "$A", end]
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, made.token_to_id(word)) for word in dict.fromkeys(words)]
    )


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
