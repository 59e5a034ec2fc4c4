"""`mmpretrain shards check` and `mmpretrain shards index`: what is wrong with a set of shards, before training."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeVar

from mmpretrain.data.check import WANTED, Caption, ShardCheck, Wanted, check_shard
from mmpretrain.data.check_report import Duplicates, Report, share_of, summarize
from mmpretrain.data.decode import JsonCaption, TextCaption
from mmpretrain.data.shards import Shard, expand
from mmpretrain.errors import EXIT_DONE, EXIT_FAILED, InputError

Checked = TypeVar("Checked")

PATIENCE = 3.0
"""Seconds for which shards are read in this process, before others are started, which takes about as long."""


def add_parsers(commands: Any) -> None:
    """Add `check` and `index` to the sub-commands of `mmpretrain shards`."""
    check = commands.add_parser(
        "check",
        help="say what is lost, missing, unreadable, empty or there twice",
        description="Look through shards before training: losses, missing fields, unreadable pictures, empty "
        "captions, duplicates by key and by content, caption lengths. Exit status: 0 sound, 1 something is wrong "
        "with the data, 2 wrong input.",
    )
    _common(check)
    add = check.add_argument
    add("--sample", type=int, metavar="N", help="read and decode N samples of each shard (default: all)")
    add("--image", metavar="FIELD", help="picture field, or none (default: jpg, jpeg, png, webp or gif)")
    add(
        "--caption",
        metavar="FIELD[:PATH]",
        help="caption field such as txt, or json:names.common, or none (default: txt, or json:caption)",
    )
    add("--batch-size", type=int, metavar="B", help="global batch size: also print each worker's share of an epoch")
    add("--ranks", type=int, default=1, metavar="R", help="processes that train (default: 1)")
    add("--workers", type=int, default=0, metavar="W", help="loading workers of each rank (default: 0)")
    _common(commands.add_parser("index", help="make the index of each shard, to keep or upload beside it"))


def _common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", nargs="+", metavar="PATH", help="shards, patterns such as 'data/{000..009}.tar', or folders")
    add("--json", action="store_true", help="print one JSON object")
    add("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="that read (default: one per core)")


def check(args: argparse.Namespace) -> int:
    """Run `shards check`; returns 0 for a sound set, 1 where something is wrong."""
    for name, least in (("sample", 1), ("batch_size", 1), ("ranks", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} is {value}; give at least {least}")
    if args.batch_size is not None and args.batch_size % args.ranks:
        raise InputError(f"--batch-size {args.batch_size} cannot be divided over {args.ranks} ranks")
    wanted = _wanted(args.image, args.caption)
    task = partial(check_shard, wanted=wanted, decode=args.sample)
    checks: list[ShardCheck] = _over(expand(args.path), task, args.processes)
    share = None
    if args.batch_size is not None:
        share = share_of(sum(c.samples for c in checks), args.batch_size, args.ranks, args.workers)
    report = summarize(checks, wanted, share)
    print(json.dumps(plain(report)) if args.json else "\n".join(lines(report)))
    return EXIT_FAILED if report.problems else EXIT_DONE


class _Indexed(NamedTuple):
    shard: str
    samples: int
    lost: int
    causes: dict[str, int]
    problem: str | None


def index(args: argparse.Namespace) -> int:
    """Run `shards index`; returns 1 where a shard cannot be read or has lost samples."""
    found = _over(expand(args.path), _index_one, args.processes)
    if args.json:
        print(json.dumps(plain(found)))
    else:
        for one in found:
            causes = ", ".join(f"{cause} {count}" for cause, count in one.causes.items())
            lost = f", {one.lost} lost ({causes})" if one.lost or one.causes else ""
            said = one.problem if one.problem is not None else f"{one.shard}: {one.samples} samples{lost}"
            print(printable(said))
        print(f"{sum(one.samples for one in found)} samples in {_count(len(found), 'shard')}")
    return EXIT_FAILED if any(one.lost or one.causes or one.problem for one in found) else EXIT_DONE


def _index_one(name: str) -> _Indexed:
    try:
        shard = Shard(name)
    except (InputError, OSError) as error:
        return _Indexed(name, 0, 0, {}, str(error))
    return _Indexed(name, len(shard), shard.lost, dict(Counter(event.cause for event in shard.events)), None)


def _wanted(image: str | None, caption: str | None) -> Wanted:
    images = WANTED.images if image is None else (() if image == "none" else (image,))
    if caption is None:
        return Wanted(images)
    field, colon, path = caption.partition(":")
    one: Caption = JsonCaption(field, path) if colon else TextCaption(field)
    return Wanted(images, () if caption == "none" else (one,))


def _over(names: Sequence[str], task: Callable[[str], Checked], processes: int) -> list[Checked]:
    """Run `task` for each shard, in order, with a bar on a terminal; processes start where there is work for them."""
    if processes < 1:
        raise InputError(f"--processes is {processes}; give at least 1")
    found: list[Checked] = []
    start = time.monotonic()
    with _progress(len(names)) as advance:
        while len(found) < len(names) and (processes == 1 or time.monotonic() - start < PATIENCE):
            found.append(_then(advance, task(names[len(found)])))
        if len(found) == len(names):
            return found
        pool = ProcessPoolExecutor(min(processes, len(names) - len(found)), mp_context=get_context("spawn"))
        try:
            return found + [_then(advance, one) for one in pool.map(task, names[len(found) :])]
        finally:
            pool.shutdown(cancel_futures=True)


def _then(advance: Callable[[], None], found: Checked) -> Checked:
    advance()
    return found


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("shards", total=total)
        yield lambda: bar.update(task, advance=1)


def plain(value: Any) -> Any:
    """Turn named tuples inside a value into dictionaries, for JSON; texts lose characters that cannot be shown."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: plain(part) for name, part in zip(value._fields, value)}
    if isinstance(value, dict):
        return {printable(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return printable(value) if isinstance(value, str) else value


def lines(report: Report) -> list[str]:
    """Say what a report holds, a line for each finding."""
    size = human_bytes(report.bytes)
    found = [f"{report.samples} samples in {_count(report.shards, 'shard')}, {size}; lost {report.lost}"]
    found += [f"  {name}: {count} samples" for name, count in report.fields.items()]
    for modality, tally in report.undecodable.items():
        found.append(f"  {modality}: {tally.of} decoded, {tally.faults} unreadable ({tally.faults / tally.of:.2%})")
    found += _duplicate_line("key", report.duplicate_keys)
    found += _duplicate_line("content", report.duplicate_contents)
    found += _histogram("characters of a caption", report.caption_characters)
    found += _histogram("words of a caption", report.caption_words)
    if (share := report.share) is not None:
        found.append(
            f"an epoch: {share.steps} steps of {share.global_batch_size}; smallest share of a worker "
            f"({_count(share.ranks, 'rank')}, {share.workers} workers each): "
            f"{share.batches} batches of {share.batch_size}"
        )
    found += [f"PROBLEM: {problem}" for problem in report.problems] or ["sound: nothing wrong was found"]
    return [printable(line) for line in found]


def _duplicate_line(what: str, found: Duplicates) -> list[str]:
    if not found.groups:
        return [f"no two samples with the same {what}"]
    pairs = "; ".join(" = ".join(pair) for pair in found.examples)
    return [f"{found.samples} samples with the {what} of another ({found.groups} groups): {pairs}"]


def _histogram(title: str, counts: dict[str, int]) -> list[str]:
    if not counts:
        return []
    widest, most = max(map(len, counts)), max(counts.values())
    bars = [f"  {name:>{widest}} {'#' * round(30 * count / most):30} {count}" for name, count in counts.items()]
    return [f"{title}:", *bars]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def printable(text: str) -> str:
    """Keep escape codes, line ends and broken characters of names, keys and captions from the terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def human_bytes(count: float) -> str:
    """Write a number of bytes with three digits and its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
