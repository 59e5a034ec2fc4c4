"""What the loader yields: the batches of one optimizer step, and the trace of where their rows came from."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpretrain.data.events import DataEvent
from mmpretrain.errors import InputError
from mmpretrain.types import Batch, Padded, Tokenizer

Example = dict[str, Any]
"""Modality -> a tensor, or a text that is tokenized with its batch."""


class Drawn(NamedTuple):
    """One row of a step: `id` is `shard:key` of the sample it holds.

    `lost`: why the sample that belongs here is not it; None where it is.
    """

    source: str
    id: str
    example: Example
    lost: DataEvent | None


class Trace:
    """Where a step's rows came from, for this rank: `ids` and `events` are by source, ids in the order of the rows.

    A plain class, because pinning and moving to a device walk into tuples, lists and dataclasses but not into this.
    """

    def __init__(self, ids: dict[str, list[str]], events: dict[str, list[DataEvent]]) -> None:
        self.ids, self.events = ids, events


class Step(NamedTuple):
    """This rank's share of one optimizer step: a batch for each source, and their trace."""

    batches: dict[str, Batch]
    trace: Trace


class Collate:
    """Stack tensors and tokenize texts: rows -> `Step`; counts the texts cut to the context length."""

    def __init__(self, tokenizers: Mapping[str, Tokenizer]) -> None:
        self.tokenizers = dict(tokenizers)
        self.truncated = multiprocessing.Value("q", 0)

    def __call__(self, rows: Sequence[Drawn]) -> Step:
        """Collate the rows of one step; raises `InputError` where a field gives what no batch can hold."""
        sources: dict[str, list[Drawn]] = {}
        for row in rows:
            sources.setdefault(row.source, []).append(row)
        return Step(
            {name: self._batch([row.example for row in found]) for name, found in sources.items()},
            Trace(
                {name: [row.id for row in found] for name, found in sources.items()},
                {name: [row.lost for row in found if row.lost is not None] for name, found in sources.items()},
            ),
        )

    def _batch(self, examples: Sequence[Example]) -> Batch:
        return {modality: self._column(modality, [e[modality] for e in examples]) for modality in examples[0]}

    def _column(self, modality: str, values: list[Any]) -> Padded:
        if isinstance(values[0], Tensor):
            return Padded(torch.stack(values))
        if isinstance(values[0], str):
            if modality not in self.tokenizers:
                raise InputError(f"{modality!r} is text but has no tokenizer; add data.module.tokenizers.{modality}")
            tokenizer = self.tokenizers[modality]
            before = getattr(tokenizer, "truncated", 0)
            padded = tokenizer(values)
            with self.truncated.get_lock():
                self.truncated.value += getattr(tokenizer, "truncated", 0) - before
            return padded
        raise InputError(f"field {modality!r} gives {type(values[0]).__name__}; expected a tensor or a text")
