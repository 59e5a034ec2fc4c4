"""ViT-B/32 trained from JPEG shards with all cores, against the same steps on data that is on the device already.

Part of `python -m benchmarks.gpu`. The shards hold pictures of 512 x 384 and captions of 16 ids on average; they are
read by `DataModule.loader`. What the loader gives by itself is measured too: it names the bound where it is the lower.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import random
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import _gpu
from benchmarks import _harness as harness
from benchmarks._captions import web_lengths

MODEL = "ViT-B-32"
SHARD = 256
WORDS = "a the old red boat lies in front of palace and flower opens on green lake under morning"
"""Each is one id of CLIP's vocabulary."""
NEAR = 1 / 1.1
"""The ratio to synthetic input that must be reached: within 10 %."""


def write_shards(folder: Path, count: int, processes: int) -> str:
    """Write shards of `count` pictures and captions, several at a time, and return their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = web_captions(count)
    jobs = [
        (folder / f"{number:05}.tar", start, captions[start : start + SHARD])
        for number, start in enumerate(range(0, count, SHARD))
    ]
    if processes > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.starmap(_write_shard, jobs, chunksize=1)
    else:
        for job in jobs:
            _write_shard(*job)
    return str(folder / f"{{00000..{len(jobs) - 1:05}}}.tar")


def web_captions(count: int) -> list[str]:
    """Captions as long as those of the web, of words that are one id each."""
    generator, lengths = random.Random(0), web_lengths(count)
    generator.shuffle(lengths)
    return [" ".join(generator.choices(WORDS.split(), k=length - 2)) for length in lengths]


def _write_shard(path: Path, start: int, captions: list[str]) -> None:
    from benchmarks._pictures import picture

    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, caption in enumerate(captions, start):
            for extension, data in (("jpg", picture(index, (512, 384))), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{index:08}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def loader(shards: str, image_size: int, context: int, batch: int, workers: int) -> Any:
    """Return the loader of a training run of any length."""
    from mmpretrain.data.datamodule import DataModule, Source
    from mmpretrain.data.decode import Image, TextCaption
    from mmpretrain.data.preprocess import Augment
    from mmpretrain.data.tokenizer import ClipTokenizer

    fields = {"image": Image(Augment(image_size, scale=(0.9, 1.0))), "text": TextCaption()}
    module = DataModule(
        {"pairs": Source(shards, fields)}, {"text": ClipTokenizer(context)}, batch, 0, num_workers=workers
    )
    return module.loader(0, 1, 0, 10**6)


def measure(
    trainee: Any, shards: str, batch: int, workers: int, seconds: float, rounds: int, pictures: int
) -> dict[str, Any]:
    """Samples/s of the loader alone, of synthetic input and of the shards, in the process of a built and warm side."""
    from mmpretrain.data.device_prefetch import DevicePrefetch

    setting = "compiled" if trainee.compiled else "eager"
    size, context = trainee.config["vision_cfg"].get("image_size", 224), trainee.config["text_cfg"]["context_length"]
    loading = iter(loader(shards, size, context, batch, workers))
    strange = _strange(next(loading).batches["pairs"]["text"].values, context, pictures)
    alone = _alone(loading, batch, seconds, workers)
    fed = iter(DevicePrefetch(loading, trainee.device))  # type: ignore[arg-type]  # endless: it has no length

    def from_shards(_: int) -> None:
        trainee.step(setting, next(fed).batches["pairs"])

    def fresh() -> bool:
        """Throw away what was loaded while the other side was measured."""
        for _ in range(2 * max(1, workers) + 1):
            next(fed)
        return True

    synthetic = itertools.cycle(trainee.batches)

    def from_device(_: int) -> None:
        trainee.step(setting, next(synthetic))

    for _ in range(4):  # sizes of text that the synthetic batches did not have
        from_shards(0)
    each = _gpu.timed(from_device, 2, trainee.device)
    repeat = max(2, round(seconds / each))
    found = harness.alternate(
        {
            "shards": lambda: fresh() and batch / _gpu.timed(from_shards, repeat, trainee.device),
            "synthetic": lambda: batch / _gpu.timed(from_device, repeat, trainee.device),
        },
        rounds,
    )
    return {"loader": alone, "setting": setting, "strange": strange, **found}


def _strange(ids: Any, context: int, pictures: int) -> int:
    """How many texts (B,L) are not captions of the shards."""
    from mmpretrain.data.tokenizer import ClipTokenizer

    tokenizer, written = ClipTokenizer(context), web_captions(pictures)
    known = {tuple(row[row != 0].tolist()) for row in tokenizer(written).values}
    return sum(tuple(row[row != 0].tolist()) not in known for row in ids)


def _alone(batches: Iterator[Any], batch: int, seconds: float, workers: int) -> float:
    for _ in range(2 * max(1, workers) + 1):  # what was loaded ahead does not count
        next(batches)
    start, count = time.perf_counter(), 0
    while count % max(1, workers) or time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return count * batch / (time.perf_counter() - start)


def measured(sides: _gpu.Sides, name: str, shards: str, given: Any, batch: int, clock: _gpu.Clock) -> harness.Report:
    """Measure in the process of ours, which has built and compiled the model `name`."""
    answer = sides.ask(
        "ours",
        clock.left(),
        do="end_to_end",
        shards=shards,
        batch=batch,
        workers=given.workers,
        seconds=given.feed_seconds,
        rounds=given.rounds,
        pictures=given.pictures,
    )
    checked = harness.check({"texts of a batch that are not captions of the shards": (answer["strange"], 0)})
    row = harness.Row(
        f"{name} from shards, {harness.cores()} cores",
        "samples/s",
        answer["shards"],
        answer["synthetic"],
        "the same steps on synthetic input",
        target=NEAR,
    )
    bound = "loader" if answer["loader"] < row.as_json()["peer"] else "GPU"
    notes = [
        f"The loader alone: {answer['loader']:,.0f} samples/s with {given.workers} workers. The {bound} is the bound."
    ]
    settings = {"batch": batch, "setting": answer["setting"], "rounds": given.rounds, "pictures": "512 x 384"}
    return harness.Report("GPU end_to_end", [row], checked, ["torch", "timm"], settings, notes)
