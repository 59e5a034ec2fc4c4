"""Hostile input: shards, pictures, texts, configs, model folders and servers of an enemy, to us and to peers.

`python -m tests.faults.hostile` prints a table. Each case runs in a process of its own with 20 seconds and a measured
peak of memory. With us none may run code (the payloads all make a file `marker`), none may hang, none may take more
than 1 GiB above what was there before, and each ends in a counted event or in an `InputError`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SECONDS = 20.0
MEMORY = 2**30
CEILING = 4 * 2**30  # a runaway gets no more, so that the machine lives

Run = Callable[[Path], str]


class Case(NamedTuple):
    """What we and peers do with one hostile input; each returns "what came of it: detail", or raises.

    `prepare` makes the input in an empty folder, in another process, so that its cost is not counted.
    `harmless`: the input may also be read, as nothing in it does harm with us (an odd key is a text, no path).
    """

    name: str
    ours: Run
    peers: Mapping[str, Run] = {}
    harmless: bool = False
    prepare: Callable[[Path], object] | None = None


class Outcome(NamedTuple):
    """What came of one run: `kind` is "event", "error", "read", "raised", "ran code", "hung", "memory" or "died"."""

    kind: str
    detail: str
    seconds: float
    mebibytes: int


def held(case: Case, outcome: Outcome) -> bool:
    """Whether an outcome of ours keeps the promise."""
    return outcome.kind in ("event", "error", *(["read"] if case.harmless else []))


def run(target: Run, prepare: Callable[[Path], object] | None = None) -> Outcome:
    """Run in a forked process, in a new folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if prepare is not None and (maker := os.fork()) == 0:
            try:
                prepare(folder)
                os._exit(0)
            except BaseException as error:
                print(f"cannot prepare: {error!r}", file=sys.stderr)
            finally:
                os._exit(1)
        if prepare is not None and os.waitpid(maker, 0)[1] != 0:
            return Outcome("died", "the input could not be made", 0.0, 0)
        begun = time.monotonic()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _child(target, folder, writer)
        os.close(writer)
        text = _read(reader, child)
        seconds = time.monotonic() - begun
        kind, detail, size = json.loads(text) if text else ("hung" if seconds >= SECONDS else "died", "", 0)
        if (folder / "marker").exists():
            kind = "ran code"
        elif size > MEMORY:
            kind = "memory"
        return Outcome(kind, detail, seconds, size >> 20)


def _child(target: Run, folder: Path, writer: int) -> None:
    """Run, send (kind, detail, bytes of memory), end: nothing of the parent's cleaning up may happen here."""
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.chdir(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + CEILING
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = _peak(reset=True)
    kind, detail = _result(target, folder)
    try:
        os.write(writer, json.dumps([kind, detail[:300], max(0, _peak() - before)]).encode())
    finally:
        os._exit(0)


def _result(target: Run, folder: Path) -> tuple[str, str]:
    from mmpretrain.errors import InputError

    try:
        kind, _, detail = target(folder).partition(": ")
        return kind, detail
    except InputError as error:
        return "error", str(error)
    except BaseException as error:
        return "raised", f"{type(error).__name__}: {error}"


def _peak(reset: bool = False) -> int:
    """Most bytes of memory since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _read(reader: int, child: int) -> str:
    ready, _, _ = select.select([reader], [], [], SECONDS)
    text = os.read(reader, 2**16).decode() if ready else ""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what a payload may have started
    os.waitpid(child, 0)
    os.close(reader)
    return text


def cases() -> list[Case]:
    """Load what the cases need once, before the forks."""
    from tests.faults import hostile_bytes, hostile_configs, hostile_shards, hostile_tars

    return [*hostile_shards.CASES, *hostile_tars.CASES, *hostile_bytes.CASES, *hostile_configs.CASES]


def table(chosen: Sequence[Case], peers: bool) -> tuple[list[str], int]:
    """Run cases: rows of text, and how many of ours did not hold."""
    rows, broken = [], 0
    for case in chosen:
        outcome = run(case.ours, case.prepare)
        broken += not held(case, outcome)
        others = {name: run(target, case.prepare) for name, target in case.peers.items()} if peers else {}
        rows.append(
            f"| {case.name} | {_cell(outcome)} | " + "; ".join(f"{n}: {_cell(o)}" for n, o in others.items()) + " |"
        )
        print(rows[-1], flush=True)
    return rows, broken


def _cell(outcome: Outcome) -> str:
    bad = {"ran code": "**RAN CODE**", "hung": "**HUNG**", "memory": "**OVER 1 GiB**", "died": "**DIED**"}
    cost = f"{outcome.seconds:.1f} s, {outcome.mebibytes} MiB"
    detail = " ".join(outcome.detail.split()).replace("|", "/")[:90]
    return f"{bad.get(outcome.kind, outcome.kind)} ({cost}{': ' + detail if detail else ''})"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if a promise did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--no-peers", action="store_true", help="run ours alone")
    parser.add_argument("--json", type=Path, help="run ours alone and write the outcomes here")
    parser.add_argument("--trials", type=int, default=1, help="how often to run every case")
    parser.add_argument("--seed", type=int, default=0, help="unused: the corpus is fixed")
    arguments = parser.parse_args(argv)
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    chosen = [case for case in cases() if arguments.only in case.name] * arguments.trials
    if arguments.json is not None:
        found = {
            case.name: (held(case, outcome), *outcome) for case in chosen for outcome in [run(case.ours, case.prepare)]
        }
        arguments.json.write_text(json.dumps(found))
        return int(not all(row[0] for row in found.values()))
    if not arguments.no_peers:
        import open_clip
        import open_clip_train.data  # noqa: F401  loaded before the forks, as ours is: no time or memory of a case

        open_clip.get_tokenizer("ViT-B-32")
    print("| input | ours | peers |\n| --- | --- | --- |")
    _, broken = table(chosen, not arguments.no_peers)
    print(f"{len(chosen)} cases, {broken} in which ours did not hold")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
