"""From the checks of single shards to one report on the whole set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mmpretrain.data.check import SHOWN, WANTED, Finding, Hashes, ShardCheck, Tally, Wanted
from mmpretrain.data.shards import Shard


class Share(NamedTuple):
    """How an epoch is divided: `steps` of `global_batch_size`, of which each worker of each rank loads every W-th.

    `batches`: the fewest batches that a worker loads in an epoch, of `batch_size` samples each.
    """

    global_batch_size: int
    ranks: int
    workers: int
    steps: int
    batch_size: int
    batches: int


class Duplicates(NamedTuple):
    """Values that several samples have: how many such values, samples beyond the first of each, a few pairs of ids."""

    groups: int
    samples: int
    examples: list[list[str]]


class Report(NamedTuple):
    """What `mmpretrain shards check` says; histograms map a range ("8-15") to the captions in it."""

    shards: int
    samples: int
    bytes: int
    lost: int
    causes: dict[str, int]
    damage: list[Finding]
    unreadable_shards: Tally
    fields: dict[str, int]
    missing: dict[str, Tally]
    undecodable: dict[str, Tally]
    empty_captions: Tally
    duplicate_keys: Duplicates
    duplicate_contents: Duplicates
    caption_characters: dict[str, int]
    caption_words: dict[str, int]
    share: Share | None
    problems: list[str]


def share_of(samples: int, global_batch_size: int, ranks: int, workers: int) -> Share:
    """Divide an epoch of `samples` over ranks and workers (0 workers: the training process loads itself)."""
    steps = samples // global_batch_size
    return Share(global_batch_size, ranks, workers, steps, global_batch_size // ranks, steps // max(1, workers))


def summarize(checks: Sequence[ShardCheck], wanted: Wanted = WANTED, share: Share | None = None) -> Report:
    """Add up the checks of all shards; `problems` has one line for each thing that is wrong with the data."""
    samples = sum(check.samples for check in checks)
    fields = sum((check.fields for check in checks), Counter[str]())
    bad = [Finding(check.shard, None, check.problem) for check in checks if check.problem is not None]
    report = Report(
        shards=len(checks),
        samples=samples,
        bytes=sum(check.bytes for check in checks),
        lost=sum(check.lost for check in checks),
        causes=dict(sum((check.causes for check in checks), Counter[str]())),
        damage=[example for check in checks for example in check.examples][:SHOWN],
        unreadable_shards=Tally(len(bad), len(checks), bad[:SHOWN]),
        fields=dict(sorted(fields.items())),
        missing=_by_modality(check.missing for check in checks) | _often(checks, fields, samples, wanted),
        undecodable=_by_modality(check.undecodable for check in checks),
        empty_captions=_sum(check.empty for check in checks),
        duplicate_keys=_duplicates(checks, [check.keys for check in checks]),
        duplicate_contents=_duplicates(checks, [check.contents for check in checks]),
        caption_characters=_histogram(check.lengths for check in checks),
        caption_words=_histogram(check.words for check in checks),
        share=share,
        problems=[],
    )
    return report._replace(problems=problems(report))


def problems(report: Report) -> list[str]:
    """Say in one line each what is wrong; an empty list means that the set is sound."""
    found = []
    if report.unreadable_shards.faults:
        found.append(f"{_of(report.unreadable_shards, 'shards')} cannot be read: {_first(report.unreadable_shards)}")
    if report.lost or report.causes:
        causes = ", ".join(f"{cause} {count}" for cause, count in sorted(report.causes.items()))
        where = f": {_say(report.damage[0])}" if report.damage else ""
        places = f"from {sum(report.causes.values())} damaged or doubled places ({causes})"
        found.append(f"{report.lost} samples are lost, {places}{where}")
    for modality, tally in report.missing.items():
        if tally.faults:
            found.append(f"{_of(tally, 'samples')} have no {modality}: {_first(tally)}")
    for modality, tally in report.undecodable.items():
        if tally.faults:
            share = f"{tally.faults / tally.of:.2%}"
            found.append(f"{_of(tally, 'samples')} ({share}) have an unreadable {modality}: {_first(tally)}")
    if report.empty_captions.faults:
        found.append(f"{_of(report.empty_captions, 'samples')} have an empty caption: {_first(report.empty_captions)}")
    if report.share is not None and report.share.steps == 0:
        found.append(f"{report.samples} samples are fewer than one batch of {report.share.global_batch_size}")
    return found


def _of(tally: Tally, what: str) -> str:
    return f"{tally.faults} of {tally.of} {what}"


def _first(tally: Tally) -> str:
    return _say(tally.examples[0])


def _say(finding: Finding) -> str:
    return finding.reason if finding.key is None else f"{finding.shard}:{finding.key} {finding.reason}"


def _sum(tallies: Iterable[Tally]) -> Tally:
    count, of, examples = 0, 0, list[Finding]()
    for tally in tallies:
        count, of, examples = count + tally.faults, of + tally.of, [*examples, *tally.examples][:SHOWN]
    return Tally(count, of, examples)


def _by_modality(found: Iterable[dict[str, Tally]]) -> dict[str, Tally]:
    every = list(found)
    modalities = dict.fromkeys(modality for one in every for modality in one)
    return {modality: _sum(one[modality] for one in every if modality in one) for modality in modalities}


def _often(checks: Sequence[ShardCheck], fields: Counter[str], samples: int, wanted: Wanted) -> dict[str, Tally]:
    """Find the other fields that most samples have and some lack."""
    known = {field for group in wanted.fields().values() for field in group}
    found = {}
    for field, count in sorted(fields.items()):
        if field not in known and samples / 2 < count < samples:
            lacking = (check for check in checks if check.fields[field] < check.samples)
            few = [Finding(c.shard, None, f"{c.samples - c.fields[field]} in {c.shard}") for c in lacking][:SHOWN]
            found[field] = Tally(samples - count, samples, few)
    return found


def _histogram(counts: Iterable[Counter[int]]) -> dict[str, int]:
    total = sum(counts, Counter[int]())
    return {_range(bits): total[bits] for bits in range(min(total, default=0), max(total, default=-1) + 1)}


def _range(bits: int) -> str:
    low, high = (1 << bits) >> 1, (1 << bits) - 1
    return str(low) if low >= high else f"{low}-{high}"


def _duplicates(checks: Sequence[ShardCheck], hashes: Sequence[Hashes]) -> Duplicates:
    """Count equal hashes over all shards; 8 bytes a sample are held, and no key."""
    values = np.concatenate([*hashes, np.zeros(0, dtype=np.uint64)])
    _, first, counts = np.unique(values, return_index=True, return_counts=True)
    repeated = first[counts > 1]
    ends = np.cumsum([len(part) for part in hashes])

    def name(place: int) -> str:
        which = int(np.searchsorted(ends, place, side="right"))
        row = place - (int(ends[which - 1]) if which else 0)
        return f"{checks[which].shard}:{Shard(checks[which].shard).keys[row]}"

    examples = [[name(int(p)) for p in np.flatnonzero(values == values[i])[:2]] for i in np.sort(repeated)[:SHOWN]]
    return Duplicates(len(repeated), int(counts[counts > 1].sum()) - len(repeated), examples)
