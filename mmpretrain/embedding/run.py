"""Fill a folder of embeddings: part after part, on one device or on several at a time."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmpretrain.data.decode import Image, TextCaption
from mmpretrain.data.json_fields import JsonCaption
from mmpretrain.embedding.parts import Rows, Store
from mmpretrain.embedding.sources import PICTURE, Source, SourceLost, open_source
from mmpretrain.errors import InputError
from mmpretrain.evaluation.embed import stacking
from mmpretrain.pretrained import CONFIG, WEIGHTS, Pretrained, load
from mmpretrain.types import Padded

PICTURE_FIELDS = (PICTURE, "jpg", "jpeg", "png", "webp", "gif")

Progress = Callable[[int], None]
"""Called with how many samples more are done."""


class Job(NamedTuple):
    """What every process needs to know: the folder, how the samples are read, how many go at a time."""

    folder: Path
    batch_size: int
    num_workers: int
    devices: Sequence[str]
    allow: Sequence[str] = ()


class Done(NamedTuple):
    """A sample as a worker gives it: an input of the model, or None and the reason why there is none."""

    item: int
    value: Tensor | str | None
    reason: str


class Samples(Dataset[Done]):
    """Some samples of a source, decoded; one that cannot be read is no error but says why."""

    def __init__(self, source: Source, field: Callable[..., Any], items: range) -> None:
        self.source, self.field, self.items = source, field, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Done:
        item = self.items[index]
        try:
            sample = {"__key__": self.source.key(item), **self.source.read(item)}
            return Done(item, self.field(sample, torch.Generator()), "")
        except SourceLost:  # what is left out now would never be made
            raise
        except (OSError, ValueError) as error:  # `InputError` is a ValueError
            return Done(item, None, " ".join(str(error).split()))


def embed(store: Store, job: Job, source: Source, pretrained: Pretrained, progress: Progress) -> None:
    """Make every part that is missing; raises `InputError` where none of the samples could be read.

    `source` and `pretrained`, on the CPU, are those that the store's manifest names.
    """
    missing = store.missing
    store.write_lost(source.lost())
    progress(store.manifest.samples - sum(len(store.manifest.items(part)) for part in missing))
    if len(job.devices) > 1 and len(missing) > 1:
        _embed_in_processes(store, job, missing, progress)
    elif missing:
        worker = Worker(store, job, source, pretrained, job.devices[0])
        for part in missing:
            worker.make(part, progress)
    if store.skipped() == store.manifest.samples:
        count = store.manifest.samples
        raise InputError(f"none of the {count} samples could be read; {store.folder}/*.skipped.jsonl says why")


class Worker:
    """A loaded model, which is moved to one device, and an opened source."""

    def __init__(self, store: Store, job: Job, source: Source, pretrained: Pretrained, device: str) -> None:
        self.store, self.job, self.source, self.device = store, job, source, device
        self.pretrained = pretrained._replace(model=pretrained.model.to(device))
        self.field = field_of(pretrained, store.manifest.modality)

    def make(self, part: int, progress: Progress) -> int:
        """Embed and write one part; returns how many samples it has."""
        manifest = self.store.manifest
        items, kept, skipped = manifest.items(part), list[Done](), list[dict[str, str]]()
        found: list[np.ndarray[Any, Any]] = []
        for batch in self._batches(items):
            good = [done for done in batch if done.value is not None]
            for done in batch:
                if done.value is None:
                    where = {"key": self.source.key(done.item), "path": self.source.path(done.item)}
                    skipped.append({**where, "reason": done.reason})
            if good:
                values = [done.value for done in good if done.value is not None]
                found.append(embed_values(self.pretrained, manifest.modality, values, self.device))
                kept += [done._replace(value=done.value if isinstance(done.value, str) else "") for done in good]
            progress(len(batch))
        empty = np.zeros((0, manifest.embed_dim), manifest.dtype)
        rows = Rows(
            [done.item for done in kept],
            [self.source.key(done.item) for done in kept],
            [self.source.path(done.item) for done in kept],
            [str(done.value) for done in kept],
            np.concatenate(found).astype(manifest.dtype) if found else empty,
        )
        self.store.write(part, rows, skipped)
        return len(items)

    def _batches(self, items: range) -> Iterator[list[Done]]:
        return iter(
            DataLoader(
                Samples(self.source, self.field, items),
                batch_size=self.job.batch_size,
                num_workers=self.job.num_workers,
                collate_fn=list,
                generator=torch.Generator(),
            )
        )


def field_of(pretrained: Pretrained, modality: str) -> Callable[..., Any]:
    """Return what turns a sample into an input: pixels, or a caption as a string.

    Raises `InputError` for a modality that the model has no encoder for, or that is neither.
    """
    if modality not in pretrained.model.encoders:
        known = ", ".join(pretrained.model.encoders)
        raise InputError(f"the model has no encoder for {modality!r}; it has {known}")
    if modality == "image":
        return Image(pretrained.preprocess, extensions=PICTURE_FIELDS)
    if modality == "text":
        return _caption
    raise InputError(f"modality is {modality!r}; image and text can be embedded from files")


def embed_values(pretrained: Pretrained, modality: str, values: Sequence[Any], device: str) -> np.ndarray[Any, Any]:
    """Embed pictures (3,H,W) or texts: (N,E) float32 unit vectors. Raises `InputError` for what is not finite."""
    if modality == "image":
        batch = stacking(pretrained.model)(list(values))
        given = batch if isinstance(batch, Padded) else Padded(batch)
    else:
        given = pretrained.tokenizer(values)
    with torch.inference_mode():
        found = pretrained.model.embed(modality, given.to(device)).float().cpu()
    if not found.isfinite().all():
        raise InputError("an embedding is not finite; the model's weights are broken, or overflow in half precision")
    return found.numpy()


def _caption(sample: dict[str, Any], generator: torch.Generator) -> str:
    field = TextCaption() if "txt" in sample else JsonCaption()
    text = str(field(sample, generator))
    if not text.strip():
        raise ValueError("the text is empty")
    return text


_worker: Worker | None = None


def _start(job: Job, numbers: Any, method: str) -> None:
    global _worker
    # Spawning has made itself the default here: what decodes would import torch anew for each part.
    multiprocessing.set_start_method(method, force=True)
    torch.set_num_threads(max(1, torch.get_num_threads() // len(job.devices)))
    store = Store.open(job.folder)
    manifest = store.manifest
    source = open_source(manifest.source, manifest.modality == "text", manifest.column, manifest.key_column)
    _worker = Worker(store, job, source, load(manifest.model, allow=job.allow), job.devices[numbers.get()])


def _make(part: int) -> int:
    assert _worker is not None
    return _worker.make(part, lambda _: None)


def _embed_in_processes(store: Store, job: Job, missing: Sequence[int], progress: Progress) -> None:
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(len(job.devices)):
        numbers.put(number)
    with ProcessPoolExecutor(
        len(job.devices), context, _start, (job, numbers, multiprocessing.get_start_method())
    ) as pool:
        running = {pool.submit(_make, part) for part in missing}
        try:
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    progress(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def model_digest(folder: Path) -> str:
    """Hash what the embeddings of a model folder depend on: config (preprocess, tokenizer), weights, vocabulary."""
    found = hashlib.sha256()
    for name in (CONFIG, WEIGHTS, "tokenizer.json"):
        found.update(f"\n{name}\n".encode())
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
