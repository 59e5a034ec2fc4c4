"""The config of our tokenizer for a folder with another library's `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mmpretrain.errors import InputError
from mmpretrain.interop.huggingface_config import read_json

FILE, SETTINGS = "tokenizer.json", ("special_tokens_map.json", "tokenizer_config.json")
"""What is read of a tokenizer's folder; the later of two settings wins."""


TOKENS = ("bos_token", "eos_token", "sep_token", "pad_token")
"""Settings that name a token."""


class Specials(NamedTuple):
    """The tokens around a text, as words of the vocabulary, and the ids of end and padding."""

    start: str | None
    end: str
    pad: str
    end_id: int
    pad_id: int


def huggingface_tokenizer(
    path: Path, context_length: int, clean: str = "none", strip_sep_token: bool = False, pad: str = "longest"
) -> dict[str, Any]:
    """Return the config of a `HuggingFaceTokenizer` that gives the ids which transformers gives for that folder."""
    found = special_tokens(path)
    config: dict[str, Any] = {
        "_target_": "mmpretrain.data.tokenizer.HuggingFaceTokenizer",
        "path": str(path if path.is_dir() else path.parent),
        "context_length": context_length,
        "eos_token": found.end,
        "pad_token": found.pad,
        "start_token": found.start,
        "pad": pad,
        "clean": clean,
    }
    return {**config, "strip_sep_token": True} if strip_sep_token else config


def special_tokens(path: Path) -> Specials:
    """Find out what the tokenizer of a folder (or of a `tokenizer.json`) puts around a text and pads with.

    Start and end are what the file itself adds to an empty text, unless `tokenizer_config.json` beside it says
    `add_bos_token` or `add_eos_token`. Raises `InputError` for a file that cannot be read or that does not say.
    """
    import tokenizers

    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} has no {FILE}; give the folder of the tokenizer (--tokenizer FOLDER)")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{file} is not a {FILE} ({error}); save it with Tokenizer.save") from error
    padding = tokenizer.padding
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = _settings(file.parent)
    start, end = _around(tokenizer.encode("").ids, tokenizer, settings, file)
    pad = settings.get("pad_token") or (padding["pad_token"] if padding else None)
    if end is None or pad is None:
        lacks = "end of text" if end is None else "padding"
        raise InputError(f"{file} does not say its {lacks}; put its {SETTINGS[1]} beside it (eos_token, pad_token)")
    end_id, pad_id = tokenizer.token_to_id(end), tokenizer.token_to_id(pad)
    if end_id is None or pad_id is None:
        raise InputError(f"{file} lacks {(end if end_id is None else pad)!r}, which its settings name")
    return Specials(start, end, pad, end_id, pad_id)


def _around(ids: list[int], tokenizer: Any, settings: dict[str, Any], file: Path) -> tuple[str | None, str | None]:
    """Return start and end token of an empty text that has the ids `ids`."""
    words = [str(tokenizer.id_to_token(i)) for i in ids]
    if len(words) > 2:
        raise InputError(f"{file} puts {words} around a text; supported are one token before it and one behind it")
    ends = settings.get("eos_token") or settings.get("sep_token")
    if len(words) == 1:
        start, end = (None, words[0]) if ends is None or words[0] == ends else (words[0], ends)
    else:
        start, end = words or (None, ends)
        known = [settings[key] for key in ("eos_token", "sep_token") if settings.get(key)]
        if known and end not in known:
            raise InputError(f"{file} puts {words} around a text, but its settings say that {known[0]!r} ends one")
    if settings.get("add_bos_token") is not None:
        start = settings.get("bos_token") if settings["add_bos_token"] else None
    if settings.get("add_eos_token"):
        end = settings.get("eos_token", end)
    return start, end


def _settings(folder: Path) -> dict[str, Any]:
    """Read the settings beside a tokenizer; a token is a string there, or a dictionary with its `content`."""
    found: dict[str, Any] = {}
    for name in SETTINGS:
        if not (folder / name).is_file():
            continue
        settings = {
            key: value["content"] if isinstance(value, dict) and "content" in value else value
            for key, value in read_json(folder / name).items()
            if value is not None
        }
        if wrong := [key for key in TOKENS if not isinstance(settings.get(key, ""), str)]:
            raise InputError(f"{folder / name}: {wrong[0]} is {settings[wrong[0]]!r:.80}; expected a token as text")
        found |= settings
    return found
