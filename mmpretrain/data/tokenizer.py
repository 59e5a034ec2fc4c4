"""Texts to ids: CLIP's byte pairs, raw bytes, or any tokenizer.json; all share one way to cut and pad.

No tokenizer here starts threads (texts are encoded one by one), so forked data workers are safe.
"""

from __future__ import annotations

import gzip
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, get_args

import regex  # type: ignore[import-untyped]
import tokenizers
import torch
from tokenizers import models

from mmpretrain.data.cleaning import CLEANERS, Clean, lower
from mmpretrain.errors import InputError
from mmpretrain.types import Lengths, Padded

Pad = Literal["longest", "context_length"]

CLIP_VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
CLIP_MERGES = 48_894  # 49408 ids less 256 bytes, the same 256 at the end of a word, and two special ids
CLIP_SPECIAL = ("<start_of_text>", "<end_of_text>")
CLIP_WORD = regex.compile(
    "|".join(CLIP_SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


class BaseTokenizer(ABC):
    """Texts -> ids (B,L) int64 and mask (B,L), each row from the start id (if any) to `eos_id`, then padding.

    `pad`: "longest" pads to the longest text of the call, rounded up to a multiple of `pad_multiple` so that shapes
    are few, but never beyond `context_length`; "context_length" always pads to that. The lengths come along.
    A text that needs more than `context_length` ids is cut, keeps its end id, and is counted in `truncated`.
    Raises `InputError` for a `context_length` under 2, another `pad`, a `pad_multiple` under 1, and what is not text.
    `vocabulary` is the file that decides the ids, None where none does.
    """

    vocabulary: Path | None = None

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        start_id: int | None,
        eos_id: int,
        pad_id: int,
        pad: Pad,
        pad_multiple: int = 8,
    ) -> None:
        if isinstance(context_length, bool) or not isinstance(context_length, int) or context_length < 2:
            raise InputError(f"context_length={context_length!r}; expected an integer of at least 2 (start and end)")
        if pad not in get_args(Pad):
            raise InputError(f"pad={pad!r}; expected one of {', '.join(get_args(Pad))}")
        if isinstance(pad_multiple, bool) or not isinstance(pad_multiple, int) or pad_multiple < 1:
            raise InputError(f"pad_multiple={pad_multiple!r}; expected an integer of at least 1 (1 rounds nothing up)")
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.start_id = start_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.pad = pad
        self.pad_multiple = pad_multiple
        self.truncated = 0

    def __call__(self, texts: Sequence[str]) -> Padded:
        """Tokenize texts (a single string counts as one text)."""
        rows = [self._row(text) for text in ([texts] if isinstance(texts, str) else texts)]
        lengths = Lengths([len(row) for row in rows])
        length = self.context_length
        if self.pad == "longest":
            length = min(-(-lengths.longest // self.pad_multiple) * self.pad_multiple, length)
        values = torch.tensor([row + [self.pad_id] * (length - len(row)) for row in rows], dtype=torch.int64).view(
            len(rows), length
        )
        mask = torch.arange(length) < torch.from_numpy(lengths.counts)[:, None]
        return Padded(values, mask, lengths)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids up to the first `eos_id`, without start id and trailing padding."""
        kept = [int(i) for i in ids]
        for i in kept:
            if not 0 <= i < self.vocab_size:
                raise InputError(f"got the id {i}; expected ids from 0 to {self.vocab_size - 1}")
        if self.eos_id in kept:
            kept = kept[: kept.index(self.eos_id)]
        while kept and kept[-1] == self.pad_id:
            kept.pop()
        return self._decode([i for i in kept if i != self.start_id])

    def _row(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"got a text of type {type(text).__name__}; expected str: decode or convert it")
        start = [] if self.start_id is None else [self.start_id]
        row = start + self._encode(text, self.context_length)
        if len(row) >= self.context_length:
            self.truncated += 1
            row = row[: self.context_length - 1]
        return [*row, self.eos_id]

    @abstractmethod
    def _encode(self, text: str, limit: int) -> list[int]:
        """Ids of a text without start and end; those after the first `limit` may be left out."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids without start, end and padding."""


class ClipTokenizer(BaseTokenizer):
    """CLIP's lower-cased byte pairs: 49,408 ids, equal to those of open_clip's SimpleTokenizer for any text.

    The special words `<start_of_text>` and `<end_of_text>` become their ids inside a text too, as there.
    `decode` gives the cleaned text with a space after every word. `pad_id` is 0 in CLIP; 49407, the end id, repeats
    the end as SigLIP does. Vocabulary: OpenAI CLIP, BPE_NOTICE.txt.
    """

    def __init__(self, context_length: int = 77, pad: Pad = "longest", pad_id: int = 0, pad_multiple: int = 8) -> None:
        start, end = (_clip_word(word)[0] for word in CLIP_SPECIAL)
        if not 0 <= pad_id <= end:
            raise InputError(f"pad_id={pad_id}; expected an id from 0 to {end}")
        super().__init__(end + 1, context_length, start, end, pad_id, pad, pad_multiple)
        self.vocabulary = CLIP_VOCABULARY

    def _encode(self, text: str, limit: int) -> list[int]:
        words = CLIP_WORD.findall(lower(text))[:limit]  # a word gives at least one id
        return [i for word in words for i in _clip_word(word)]

    def _decode(self, ids: list[int]) -> str:
        symbols, _ = _clip()
        text = "".join(symbols[i] for i in ids).translate(CHARACTER_TO_BYTE)
        return text.encode("latin-1").decode("utf-8", errors="replace").replace("</w>", " ").strip()


# The vocabulary writes each byte as one visible character: itself, or the next one from U+0100 on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_TO_CHARACTER = {byte: chr(256 + n) for n, byte in enumerate(_HIDDEN)}
CHARACTER_TO_BYTE = {256 + n: chr(byte) for n, byte in enumerate(_HIDDEN)}


@cache
def _clip() -> tuple[list[str], models.BPE]:
    """Symbols in order of id and the byte pair model, read once per process (so tokenizers pickle small)."""
    lines = gzip.decompress(CLIP_VOCABULARY.read_bytes()).decode("utf-8").split("\n")
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : CLIP_MERGES + 1])]
    characters = [chr(byte).translate(BYTE_TO_CHARACTER) for byte in (*_VISIBLE, *_HIDDEN)]
    symbols = [*characters, *(c + "</w>" for c in characters), *(left + right for left, right in merges)]
    symbols += CLIP_SPECIAL
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    return symbols, models.BPE(vocabulary, merges, end_of_word_suffix="</w>")


@lru_cache(maxsize=2**16)
def _clip_word(word: str) -> tuple[int, ...]:
    """Ids of one word, or of a special word as a whole."""
    symbols, bpe = _clip()
    if word in CLIP_SPECIAL:
        return (len(symbols) - len(CLIP_SPECIAL) + CLIP_SPECIAL.index(word),)
    characters = word.encode("utf-8").decode("latin-1").translate(BYTE_TO_CHARACTER)
    return tuple(token.id for token in bpe.tokenize(characters))


class ByteTokenizer(BaseTokenizer):
    """UTF-8 bytes as ids: 0 pads, 1 starts, 2 ends, byte b is 3 + b (259 ids)."""

    def __init__(self, context_length: int = 256, pad: Pad = "longest", pad_multiple: int = 8) -> None:
        super().__init__(3 + 256, context_length, 1, 2, 0, pad, pad_multiple)

    def _encode(self, text: str, limit: int) -> list[int]:
        # a lone surrogate has no UTF-8 form and becomes "?"
        return [3 + byte for byte in text[:limit].encode("utf-8", errors="replace")[:limit]]

    def _decode(self, ids: list[int]) -> str:
        return bytes(i - 3 for i in ids if i >= 3).decode("utf-8", errors="replace")


class HuggingFaceTokenizer(BaseTokenizer):
    """The tokenizer of a local `tokenizer.json` or of a folder with one; nothing is downloaded or executed.

    `eos_token`, `pad_token` and `start_token` (None = no start id) name tokens of its vocabulary. They are
    put around each text here; what the file itself would add, cut or pad is left out. `clean` is done to each text
    first: `whitespace` repairs it and joins white space, `lower` also lowers the case, `canonicalize` also takes
    punctuation away (SigLIP); `lowercase` and `unpunctuated` are what transformers does for SigLIP 2 and SigLIP.
    `strip_sep_token` writes id 0 where the end id would stand (CLIPA). Raises `InputError` for a file that cannot be
    read and a token it lacks.
    """

    def __init__(
        self,
        path: str | Path,
        context_length: int,
        eos_token: str,
        pad_token: str,
        start_token: str | None = None,
        pad: Pad = "longest",
        pad_multiple: int = 8,
        clean: Clean = "none",
        strip_sep_token: bool = False,
    ) -> None:
        if clean not in CLEANERS:
            raise InputError(f"clean={clean!r}; expected one of {', '.join(CLEANERS)}")
        self.clean, self.strip_sep_token = clean, strip_sep_token
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise InputError(f"path={str(path)!r}: no file {file}; expected a tokenizer.json or a folder with one")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{file} is not a tokenizer.json ({error}); save it with Tokenizer.save") from error
        self.vocabulary = file
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        super().__init__(
            max(ids.values(), default=-1) + 1,
            context_length,
            start_id=None if start_token is None else self._id(start_token, "start_token"),
            eos_id=self._id(eos_token, "eos_token"),
            pad_id=self._id(pad_token, "pad_token"),
            pad=pad,
            pad_multiple=pad_multiple,
        )

    def _id(self, token: str, option: str) -> int:
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            special = ", ".join(t.content for t in self._tokenizer.get_added_tokens_decoder().values()) or "none"
            raise InputError(f"{option}={token!r} is not in the vocabulary; its special tokens are {special}")
        return found

    def _row(self, text: str) -> list[int]:
        row = super()._row(text)
        return [0 if i == self.eos_id else i for i in row] if self.strip_sep_token else row

    def _encode(self, text: str, limit: int) -> list[int]:
        ids: list[int] = self._tokenizer.encode(CLEANERS[self.clean](text), add_special_tokens=False).ids
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
