"""Shards on a disk to batches of training, samples/s: our loader against open_clip's own.

    python -m benchmarks.loader [--rounds 5] [--workers 1 2] [--batch 256] [--json]

Both read the same shards of JPEGs (512 x 384, 26 kB) and captions, shuffle, take a random crop of 90 to 100 % of the
area to 224 x 224 and tokenize. Ours is `DataModule.loader`, open_clip's `get_wds_dataset` with its training
transform, in the webdataset it asks for. Each side has a process of its own, which stands still while the other is
measured; what was loaded meanwhile is not counted. First all captions of one epoch of both are compared, and the
pixels of the same centre crop of 256 pictures, made by the same decoder and resize as in training.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from benchmarks import _harness as harness
from benchmarks import _peer

COUNT, COMPARED = 2048, 256
SIZE = 224
PEER = "open_clip get_wds_dataset"


class Batches(Protocol):
    """One side's loader: `crop` is "center" or "random"; yields images and ids (B,L), padded by 0."""

    def __call__(self, shards: str, crop: str, batch: int, workers: int, epochs: int) -> Iterator[tuple[Any, Any]]:
        """Begin to load."""


def ours(shards: str, crop: str, batch: int, workers: int, epochs: int) -> Iterator[tuple[Any, Any]]:
    """Yield from the loader of a training run: images uint8."""
    from mmpretrain.data.datamodule import DataModule, Source
    from mmpretrain.data.decode import Image, TextCaption
    from mmpretrain.data.preprocess import Augment, Preprocess
    from mmpretrain.data.tokenizer import ClipTokenizer

    transform = Preprocess(SIZE, exact=False) if crop == "center" else Augment(SIZE, scale=(0.9, 1.0))
    fields = {"image": Image(transform), "text": TextCaption()}
    module = DataModule({"pairs": Source(shards, fields)}, {"text": ClipTokenizer()}, batch, 0, num_workers=workers)
    for step in module.loader(0, 1, 0, epochs * (COUNT // batch)):
        yield step.batches["pairs"]["image"].values, step.batches["pairs"]["text"].values


def peer(shards: str, crop: str, batch: int, workers: int, epochs: int) -> Iterator[tuple[Any, Any]]:
    """Yield from open_clip's loader of a training run: images float32, normalised."""
    import open_clip
    import open_clip_train.data
    from open_clip.transform import image_transform

    # In its favour: its buffer of 5,000 samples fills by reading two samples for each it gives; ours is as measured
    # with the buffer full from the start.
    open_clip_train.data._SAMPLE_SHUFFLE_SIZE = open_clip_train.data._SAMPLE_SHUFFLE_INITIAL
    settings = SimpleNamespace(
        train_data=shards,
        dataset_resampled=crop == "random",  # as its README trains on large data: no epoch's end to wait for
        train_num_samples=epochs * COUNT,
        train_data_upsampling_factors=None,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    transform = image_transform(SIZE, is_train=crop == "random")
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    info = open_clip_train.data.get_wds_dataset(settings, transform, True, tokenizer=tokenizer)
    yield from info.dataloader


SIDES: dict[str, Batches] = {"ours": ours, "peer": peer}


def epoch(batches: Iterator[tuple[Any, Any]], keep: Callable[[str], bool]) -> dict[str, Any]:
    """Return the pixels (3,S,S) uint8, or None where not kept, by the ids of the caption."""
    import torch
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    found: dict[str, Any] = {}
    for images, texts in batches:
        for image, text in zip(images, texts.tolist(), strict=True):
            name = " ".join(str(number) for number in text if number)
            if image.is_floating_point():
                image = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            found[name] = image.numpy() if keep(name) else None
    return found


def serve(side: str, shards: str, batch: int, workers: int) -> None:
    """Answer requests: `check` saves an epoch to a file, `rate` measures so many seconds of loading."""
    import numpy as np

    answers = _peer.answers()
    running: Iterator[tuple[Any, Any]] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        signal_workers(signal.SIGCONT)
        if request["do"] == "check":
            found = epoch(SIDES[side](shards, "center", batch, workers, 1), lambda name: hash_of(name) == 0)
            np.savez(request["file"], names=list(found), **{n: p for n, p in found.items() if p is not None})
            print(json.dumps(len(found)), file=answers)
            continue
        running = SIDES[side](shards, "random", batch, workers, 1000) if running is None else running
        for _ in range(request["discard"]):
            next(running)
        count, start = 0, time.perf_counter()
        while count % workers or time.perf_counter() - start < request["seconds"]:
            next(running)
            count += 1
        rate = count * batch / (time.perf_counter() - start)
        signal_workers(signal.SIGSTOP)
        print(json.dumps(rate), file=answers)
    signal_workers(signal.SIGCONT)  # so that they can be ended


def signal_workers(number: signal.Signals) -> None:
    """Send a signal to the loader's worker processes."""
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            os.kill(worker.pid, number)


def hash_of(name: str) -> int:
    """Which eighth of the pictures a caption is of: those of the first are compared pixel by pixel."""
    return sum(map(int, name.split())) % (COUNT // COMPARED)


def compare(files: dict[str, Path]) -> dict[str, tuple[float, float]]:
    """Compare an epoch of both sides."""
    import numpy as np

    ours, peer = (np.load(files[side]) for side in ("ours", "peer"))
    different = set(ours["names"].tolist()) ^ set(peer["names"].tolist())
    compared = sorted(set(ours.files) & set(peer.files) - {"names"})
    off = np.stack([np.abs(ours[name].astype(int) - peer[name]) for name in compared])
    return {
        "captions of one epoch missing on one side": (len(different) + COUNT - len(ours["names"]), 0),
        "pictures not compared": (max(0, COMPARED // 2 - len(compared)), 0),
        "share of pixels that differ": (float((off > 0).mean()), 0.01),
        "largest difference of a pixel, in levels": (float(off.max()), 2),
    }


def main() -> None:
    made = harness.parser(__doc__, threads=1)
    made.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker processes, one row each")
    made.add_argument("--batch", type=int, default=256)
    made.add_argument("--seconds", type=float, default=2.5, help="how long each side is measured in a round")
    made.add_argument("--serve", nargs=3, metavar=("SIDE", "SHARDS", "WORKERS"), help=argparse.SUPPRESS)
    given = made.parse_args()
    if given.serve:
        side, pattern, workers = given.serve
        return serve(side, pattern, given.batch, int(workers))
    from benchmarks import _pictures

    shards = _pictures.shards(_peer.cache(), COUNT)
    rows, checked = [], {}
    for workers in given.workers:
        harness.note(f"loader: {workers} workers")
        open_sides = {
            side: _peer.Worker(
                ["-m", "benchmarks.loader", "--batch", str(given.batch), "--serve", side, shards, str(workers)],
                _peer.environment(side == "peer"),
            )
            for side in SIDES
        }
        with open_sides["ours"], open_sides["peer"], tempfile.TemporaryDirectory() as scratch:
            if not checked:
                files = {side: Path(scratch) / f"{side}.npz" for side in SIDES}
                for side, process in open_sides.items():
                    process.ask(do="check", file=str(files[side]))
                checked = harness.check(compare(files))
            request = {"do": "rate", "discard": 3 * workers, "seconds": given.seconds}
            sides = {side: partial(process.ask, **request) for side, process in open_sides.items()}
            found = harness.alternate(sides, given.rounds)
        name = f"{workers} worker{'s' * (workers > 1)}"
        rows.append(harness.Row(name, "samples/s", found["ours"], found["peer"], PEER, target=2.5))
    notes = [
        "Ours gives uint8 pixels, normalised on the device (the image encoder does it), and text padded to the longest "
        "caption of the batch; open_clip gives float32 pixels and 77 ids."
    ]
    settings = {"batch": given.batch, "rounds": given.rounds, "open_clip with webdataset": _peer.WEBDATASET}
    packages = ["torch", "open_clip_torch", "pillow", "torchvision"]
    report = harness.Report("loader", rows, checked, packages, settings, notes)
    harness.finish(report, given.json)
    return None


if __name__ == "__main__":
    main()
