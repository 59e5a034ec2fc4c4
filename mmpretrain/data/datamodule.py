"""From shards to steps: which samples, on which rank, loaded by which processes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import lightning
import torch
from torch.utils.data import DataLoader, Sampler

from mmpretrain.data.board import ReadingBoard
from mmpretrain.data.cache import REMOTE, scheme_of
from mmpretrain.data.device_prefetch import DevicePrefetch
from mmpretrain.data.events import DataEvent
from mmpretrain.data.examples import ShardExamples
from mmpretrain.data.order import Ordering, Position
from mmpretrain.data.pool import SPARE, Pool, PooledCollate
from mmpretrain.data.prefetch import Prefetch
from mmpretrain.data.redact import redact
from mmpretrain.data.shards import Shard
from mmpretrain.data.source import Opened
from mmpretrain.data.source import Source as Source
from mmpretrain.data.step import Collate, Drawn
from mmpretrain.data.step import Step as Step
from mmpretrain.data.step import Trace as Trace
from mmpretrain.data.worker import StartWorker
from mmpretrain.errors import InputError
from mmpretrain.types import Tokenizer

PROBES = 8
"""Samples of a part tried at setup before it is said that none can be used."""


class StepSampler(Sampler[list[tuple[str, Position]]]):
    """This rank's share of each step's global batch, from `start_step` up to `max_steps`.

    `names`: source -> names of its shards; remote ones are fetched for the steps to come. Its length is that of the
    whole run, as Lightning counts the batches before a resumed step too.
    """

    def __init__(
        self,
        orders: Mapping[str, Ordering],
        names: Mapping[str, Sequence[str]],
        batch_size: int,
        rank: int,
        start_step: int,
        max_steps: int,
    ) -> None:
        self.orders, self.names = dict(orders), dict(names)
        self.start_step, self.max_steps = start_step, max_steps
        self.rows = (rank * batch_size, (rank + 1) * batch_size)

    def __iter__(self) -> Iterator[list[tuple[str, Position]]]:
        # Begun at the first step that is asked for, which is after the loader has forked its workers.
        with self._fetch_ahead() as advance:
            for step in range(self.start_step, self.max_steps):
                advance(step)
                yield [(name, at) for name, order in self.orders.items() for at in order.batch(step, *self.rows)]

    @contextlib.contextmanager
    def _fetch_ahead(self) -> Iterator[Callable[[int], object]]:
        if not any(scheme_of(name) in REMOTE for names in self.names.values() for name in names):
            yield lambda step: None
            return
        orders = copy.deepcopy(self.orders)  # they keep what was asked last, and the fetching threads ask for others

        def needed(step: int) -> list[str]:
            return [self.names[name][i] for name, order in orders.items() for i in order.shards(step, *self.rows)]

        with Prefetch(needed, self.start_step) as prefetch:
            yield prefetch.advance

    def __len__(self) -> int:
        return self.max_steps


class Sizes(NamedTuple):
    """What a source holds: shards and samples, for the log."""

    shards: int
    samples: int


class DataModule(lightning.LightningDataModule):
    """Training steps from shards, the same samples for any number of ranks and workers.

    `global_batch_size` is over all ranks and for each source. `prepare` is called once on each machine before anything
    is read (a data set that builds its own shards). `limit`: use only the first so many samples of each source (of each
    part of a mixture). `max_bad_fraction`: the share of samples that may be lost to damage. Raises `InputError` where
    shards are missing, too small for one batch or too damaged, no sample can be used, or the batch cannot be divided
    over ranks.
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
        limit: int | None = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__()
        if not sources:
            raise InputError("data has no sources; give data.train, or data.module.sources")
        if num_workers < 0:
            raise InputError(f"data.num_workers is {num_workers}; give 0 or more")
        if limit is not None and limit < 1:
            raise InputError(f"data.limit is {limit}; give at least 1 sample, or null for all")
        if not 0 <= max_bad_fraction <= 1:
            raise InputError(f"data.max_bad_fraction is {max_bad_fraction}; give a share from 0 to 1")
        self.sources, self.collate = dict(sources), Collate(tokenizers)
        self.global_batch_size, self.seed = global_batch_size, seed
        self.num_workers, self.prefetch_factor, self.prepare = num_workers, prefetch_factor, prepare
        self.limit, self.max_bad_fraction = limit, max_bad_fraction
        self.board = ReadingBoard(num_workers)
        self.shards: dict[str, list[Shard]] = {}
        self.orders: dict[str, Ordering] = {}
        self.row_bytes = 0  # of the tensors of one row of every source

    def prepare_data(self) -> None:
        """Build the data where it has to be built (one process on each machine)."""
        if self.prepare is not None:
            self.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Find and index the shards of every source, and see that samples of each can be used."""
        if self.orders:
            return
        opened = {
            name: Opened(name, source, self.limit, self.max_bad_fraction) for name, source in self.sources.items()
        }
        self.shards = {name: found.shards for name, found in opened.items()}
        self.used = {name: found.sizes for name, found in opened.items()}
        examples = self._examples()
        for name, found in opened.items():
            order = found.order(self.global_batch_size, self.seed)
            self.row_bytes += max(self._probe(examples, name, indices) for indices in found.probes(PROBES))
            self.orders[name] = order

    def sizes(self) -> dict[str, Sizes]:
        """Count shards and samples of each source."""
        return {name: Sizes(len(self.shards[name]), sum(sizes)) for name, sizes in self.used.items()}

    def known_events(self) -> dict[str, list[DataEvent]]:
        """List, for each source, what was lost already when its shards were indexed."""
        return {name: [event for shard in found for event in shard.events] for name, found in self.shards.items()}

    def train_dataloader(self) -> DataLoader[Drawn] | DevicePrefetch:
        """Yield this rank's steps from the trainer's present one on, on a GPU copied there one ahead."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("DataModule.train_dataloader needs a trainer; use loader() outside of one")
        if trainer.max_steps < 1:
            raise InputError(f"trainer.max_steps is {trainer.max_steps}; give the training length in steps")
        loader = self.loader(trainer.global_rank, trainer.world_size, trainer.global_step, trainer.max_steps)
        device = trainer.strategy.root_device
        return DevicePrefetch(loader, device) if device.type == "cuda" else loader

    def loader(self, rank: int, world_size: int, start_step: int, max_steps: int) -> DataLoader[Drawn]:
        """Yield rank `rank`'s `Step` for steps `start_step` to `max_steps`."""
        if self.global_batch_size % world_size:
            raise InputError(
                f"global_batch_size {self.global_batch_size} cannot be divided over {world_size} ranks; "
                f"set data.global_batch_size to a multiple of {world_size}"
            )
        self.setup()
        batch_size = self.global_batch_size // world_size
        names = {name: [shard.url for shard in found] for name, found in self.shards.items()}
        # The room of a batch's tensors: a little more than they take, as each column begins at a multiple of 64.
        pool = Pool(self.num_workers, self.prefetch_factor + SPARE, batch_size * self.row_bytes + 4096)
        return DataLoader(
            self._examples(),
            batch_sampler=StepSampler(self.orders, names, batch_size, rank, start_step, max_steps),
            collate_fn=PooledCollate(self.collate, pool) if self.num_workers else self.collate,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=StartWorker(),
        )

    def _examples(self) -> ShardExamples:
        fields = {name: source.fields for name, source in self.sources.items()}
        return ShardExamples(fields, self.shards, self.used, self.seed, self.board)

    def _probe(self, examples: ShardExamples, source: str, indices: list[int]) -> int:
        """Try samples until one can be used and return the bytes of its tensors.

        Raises `InputError` where none can: the fault is the config's then.
        """
        lost: list[DataEvent] = []
        for index in indices:
            found = examples.read(source, *examples.place(source, index), torch.Generator().manual_seed(0))
            if not isinstance(found, DataEvent):
                self.collate([Drawn(source, "", found, None)])
                return sum(value.nbytes for value in found.values() if isinstance(value, torch.Tensor))
            lost.append(found)
        raise InputError(
            f"none of the {len(lost)} samples tried can be used; {redact(lost[0].shard)}: {lost[0].detail}"
        )
