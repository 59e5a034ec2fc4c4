"""From shards to batches: which samples, decoded how, collated for the model."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmpretrain.data.order import Order, Position
from mmpretrain.data.shards import Shard, expand
from mmpretrain.errors import InputError
from mmpretrain.types import Batch, Padded, Tokenizer

Field = Callable[[Mapping[str, bytes], torch.Generator], Any]
"""The bytes of a sample -> one modality of an example: a tensor, or a text to be tokenized with its batch."""

Example = dict[str, Any]


class Source:
    """One kind of data: its shards, the fields that decode a sample, and how its order is mixed.

    `shards`: paths with braces, folders or URLs. `fields`: modality -> field. `window`: shards mixed at a time.
    """

    def __init__(self, shards: str | Sequence[str], fields: Mapping[str, Field], window: int = 16) -> None:
        self.shards, self.fields, self.window = shards, dict(fields), window


class ShardExamples(Dataset[tuple[str, Example]]):
    """Examples of several sources by (source, position); all randomness comes from (seed, source, epoch, index).

    So an example is the same whichever worker or rank decodes it.
    """

    def __init__(self, sources: Mapping[str, Source], shards: Mapping[str, Sequence[Shard]], seed: int) -> None:
        self.sources, self.shards, self.seed = dict(sources), {k: list(v) for k, v in shards.items()}, seed
        self.ends = {name: np.cumsum([len(shard) for shard in found]) for name, found in self.shards.items()}

    def __getitem__(self, reference: tuple[str, Position]) -> tuple[str, Example]:
        """Read, decode and augment one sample."""
        source, (epoch, index) = reference
        which = int(np.searchsorted(self.ends[source], index, side="right"))
        shard = self.shards[source][which]
        row = index - int(self.ends[source][which - 1] if which else 0)
        sample: dict[str, Any] = {"__key__": shard.keys[row], **shard.read(row)}
        generator = torch.Generator().manual_seed(self._seed(source, epoch, index))
        try:
            return source, {name: field(sample, generator) for name, field in self.sources[source].fields.items()}
        except InputError as error:
            raise InputError(f"{shard.name}: {error}") from error

    def _seed(self, source: str, epoch: int, index: int) -> int:
        text = f"{self.seed}/{source}/{epoch}/{index}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class StepSampler(Sampler[list[tuple[str, Position]]]):
    """This rank's share of each step's global batch, from `start_step` up to `max_steps`.

    Its length is that of the whole run, as Lightning counts the batches before a resumed step too.
    """

    def __init__(
        self,
        orders: Mapping[str, Order],
        local_batch_sizes: Mapping[str, int],
        rank: int,
        start_step: int,
        max_steps: int,
    ) -> None:
        self.orders, self.local, self.rank = orders, local_batch_sizes, rank
        self.start_step, self.max_steps = start_step, max_steps

    def __iter__(self) -> Iterator[list[tuple[str, Position]]]:
        for step in range(self.start_step, self.max_steps):
            batch: list[tuple[str, Position]] = []
            for name, order in self.orders.items():
                mine = slice(self.rank * self.local[name], (self.rank + 1) * self.local[name])
                batch += [(name, position) for position in order.batch(step)[mine]]
            yield batch

    def __len__(self) -> int:
        return self.max_steps


class Collate:
    """Stack tensors and tokenize texts: examples -> {source: Batch}; counts the texts cut to the context length."""

    def __init__(self, tokenizers: Mapping[str, Tokenizer]) -> None:
        self.tokenizers = dict(tokenizers)
        self.truncated = multiprocessing.Value("q", 0)

    def __call__(self, examples: Sequence[tuple[str, Example]]) -> dict[str, Batch]:
        """Collate the examples of one step."""
        sources = dict.fromkeys(source for source, _ in examples)
        return {name: self._batch([example for source, example in examples if source == name]) for name in sources}

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


class Sizes(NamedTuple):
    """What the sources hold: shards and samples, for the log."""

    shards: int
    samples: int


class DataModule(lightning.LightningDataModule):
    """Training batches `{source: Batch}` from shards, the same samples for any number of ranks and workers.

    `global_batch_size` is over all ranks and for each source. `prepare` is called once on each machine before anything
    is read (a data set that builds its own shards). Raises `InputError` where shards are missing, too small for one
    batch, or the batch cannot be divided over ranks.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        tokenizers: Mapping[str, Tokenizer],
        global_batch_size: int,
        seed: int,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        super().__init__()
        if not sources:
            raise InputError("data has no sources; give data.train, or data.module.sources")
        if num_workers < 0:
            raise InputError(f"data.num_workers is {num_workers}; give 0 or more")
        self.sources, self.collate = dict(sources), Collate(tokenizers)
        self.global_batch_size, self.seed = global_batch_size, seed
        self.num_workers, self.prefetch_factor, self.prepare = num_workers, prefetch_factor, prepare
        self.shards: dict[str, list[Shard]] = {}
        self.orders: dict[str, Order] = {}

    def prepare_data(self) -> None:
        """Build the data where it has to be built (one process on each machine)."""
        if self.prepare is not None:
            self.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Find and index the shards of every source, and try one sample of each."""
        if self.orders:
            return
        self.shards = {name: [Shard(p) for p in expand(source.shards)] for name, source in self.sources.items()}
        examples = ShardExamples(self.sources, self.shards, self.seed)
        for name, source in self.sources.items():
            sizes = [len(shard) for shard in self.shards[name]]
            if not any(sizes):
                raise InputError(
                    f"the {len(sizes)} shards of {source.shards!r} hold no sample; give shards with samples"
                )
            self.orders[name] = Order(sizes, self.global_batch_size, self.seed, window=source.window)
            self.collate([examples[name, Position(0, 0)]])

    def sizes(self) -> dict[str, Sizes]:
        """Count shards and samples of each source."""
        return {name: Sizes(len(shards), sum(map(len, shards))) for name, shards in self.shards.items()}

    def train_dataloader(self) -> DataLoader[tuple[str, Example]]:
        """Yield this rank's batches from the trainer's present step on."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("DataModule.train_dataloader needs a trainer; use loader() outside of one")
        if trainer.max_steps < 1:
            raise InputError(f"trainer.max_steps is {trainer.max_steps}; give the training length in steps")
        return self.loader(trainer.global_rank, trainer.world_size, trainer.global_step, trainer.max_steps)

    def loader(self, rank: int, world_size: int, start_step: int, max_steps: int) -> DataLoader[tuple[str, Example]]:
        """Yield rank `rank`'s batches for steps `start_step` to `max_steps`."""
        if self.global_batch_size % world_size:
            raise InputError(
                f"global_batch_size {self.global_batch_size} cannot be divided over {world_size} ranks; "
                f"set data.global_batch_size to a multiple of {world_size}"
            )
        self.setup()
        local = dict.fromkeys(self.orders, self.global_batch_size // world_size)
        return DataLoader(
            ShardExamples(self.sources, self.shards, self.seed),
            batch_sampler=StepSampler(self.orders, local, rank, start_step, max_steps),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
        )


def _start_worker(_: int) -> None:
    # Ctrl-C reaches the whole process group; the trainer saves and stops, and needs its workers until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
