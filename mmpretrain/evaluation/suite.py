"""Several models on several data sets: whatever is done is kept, and a suite that was killed goes on from there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby

from mmpretrain.distributed import of_rank_zero, rank
from mmpretrain.errors import InputError
from mmpretrain.evaluation.candidates import Candidate
from mmpretrain.evaluation.confidence import check_metrics
from mmpretrain.evaluation.embed import evaluating
from mmpretrain.evaluation.features import shared_features
from mmpretrain.evaluation.results import Measured, Results, Work
from mmpretrain.pretrained import Pretrained

Evaluator = Callable[[Pretrained], dict[str, float]]


def run_suite(
    candidates: Sequence[Candidate],
    works: Sequence[Work],
    results: Results,
    load: Callable[[Candidate], Pretrained],
    build: Callable[[Work], Evaluator],
    anew: bool = False,
) -> list[Measured]:
    """Measure every candidate in every way, models first; each rank takes its share and returns the same.

    What `results` holds is not measured again (`anew`: it is). A model is loaded once, when it is first needed, and
    dropped before the next one. Raises `InputError` naming the data set where it cannot be measured; results before it
    are kept.
    """
    kept = of_rank_zero([[None if anew else results.load(one, work) for work in works] for one in candidates])
    total = len(candidates) * len(works)
    measured: list[Measured] = []
    for candidate, known in zip(candidates, kept, strict=True):
        pretrained: Pretrained | None = None
        for _, group in groupby(zip(works, known, strict=True), key=lambda pair: pair[0].data_set):
            with shared_features():  # tasks on one data set embed its pictures once
                for work, metrics in group:
                    begin = time.monotonic()
                    if metrics is None:
                        pretrained = load(candidate) if pretrained is None else pretrained
                        metrics = _measure(pretrained, candidate, work, build)
                        seconds = time.monotonic() - begin
                        if rank() == 0:
                            results.save(candidate, work, metrics, seconds)
                        what = f"{seconds:.1f} s"
                    else:
                        what = "kept"
                    measured.append(Measured(candidate, work, metrics))
                    _say(f"[{len(measured)}/{total}] {_names(candidate, work)}: {what}")
        del pretrained
    return measured


def _measure(
    pretrained: Pretrained, candidate: Candidate, work: Work, build: Callable[[Work], Evaluator]
) -> dict[str, float]:
    try:
        with evaluating(pretrained.model):
            metrics = build(work)(pretrained)
        check_metrics(metrics)
    except InputError as error:
        raise InputError(f"{_names(candidate, work)}: {error}") from error
    # What is kept went through JSON; what is returned has too, so a suite that was killed gives the same.
    return {str(name): float(value) for name, value in of_rank_zero(dict(metrics)).items()}


def _names(candidate: Candidate, work: Work) -> str:
    return ", ".join(filter(None, (candidate.name, work.data_set, work.task)))


def _say(line: str) -> None:
    if rank() == 0:
        print(line, file=sys.stderr)
