"""`mmpretrain evaluate`: saved models, evaluators or a benchmark, and the numbers in files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmpretrain.config import instantiate
from mmpretrain.distributed import barrier, joined, of_rank_zero, rank
from mmpretrain.errors import InputError
from mmpretrain.evaluation import run_evaluators, write_metrics
from mmpretrain.evaluation.benchmark import works_of
from mmpretrain.evaluation.candidates import Candidate, find, names_one
from mmpretrain.evaluation.compare import write_comparison
from mmpretrain.evaluation.results import Measured, Results, Work, work
from mmpretrain.evaluation.suite import run_suite
from mmpretrain.evaluation.tables import csv_text, flat, json_text, rows_of
from mmpretrain.whole_file import write_whole

BESIDE = (".csv", ".html", ".parts")
"""Suffixes of what a comparison writes beside its output."""


def evaluate(config: DictConfig) -> dict[str, float]:
    """Evaluate what `config.checkpoint` names (see configs/evaluate.yaml); return, and write on rank 0, the metrics.

    One model with evaluators gives one JSON of metrics. A list, pattern or folder of models, or a benchmark, gives
    JSON, CSV and a page that compares, and goes on where it was stopped. Under torchrun every rank takes its share.
    """
    with joined(config.device) as device:
        given = [str(one) for one in config.checkpoint] if OmegaConf.is_list(config.checkpoint) else config.checkpoint
        compares = not names_one(given) or config.get("benchmark") is not None
        if compares and Path(config.output).suffix.lower() in BESIDE:
            raise InputError(
                f"output={config.output}: the table, the page and the parts are written beside the output, under its "
                f"name with {', '.join(BESIDE)}; give a name that ends with .json"
            )
        candidates = _candidates(given)
        build = partial(instantiate, allow=tuple(config.allow_targets))
        if compares:
            return _suite(config, candidates, str(device), build)
        output = Path(config.output)
        if of_rank_zero(output.exists() and not config.overwrite):
            raise InputError(f"{output} exists; give another output=, or overwrite=true")
        pretrained = candidates[0].load(device, tuple(config.allow_targets))
        _first_rank_first(partial(build, config.prepare) if config.prepare is not None else None)
        metrics = run_evaluators(pretrained, build(config.evaluators))
        if rank() == 0:
            write_metrics(output, metrics)
            print(f"written to {output}", file=sys.stderr)
            if config.json:
                print(json.dumps(metrics, indent=1, sort_keys=True))
        return metrics


def _suite(
    config: DictConfig, candidates: Sequence[Candidate], device: str, build: Callable[..., Any]
) -> dict[str, float]:
    output = Path(config.output)
    parts = output.with_suffix(".parts")
    if of_rank_zero(output.exists() and not parts.is_dir() and not config.overwrite):
        raise InputError(f"{output} exists and is of no benchmark; give another output=, or overwrite=true")
    benchmark = config.get("benchmark")
    prepare = config.prepare if benchmark is None else benchmark.prepare
    _first_rank_first(partial(build, prepare) if prepare is not None else None)
    works = _evaluators(config, device) if benchmark is None else _benchmark(config, device)
    if rank() == 0:
        parts.mkdir(parents=True, exist_ok=True)
    measured = run_suite(
        candidates,
        works,
        Results(parts),
        lambda candidate: candidate.load(device, tuple(config.allow_targets)),
        lambda one: build(one.config),
        config.overwrite,
    )
    name = "evaluators" if benchmark is None else benchmark.name
    if rank() == 0:
        _write(output, name, measured)
        if config.json:
            print(output.read_text(encoding="utf-8"), end="")
    barrier()
    return {
        "/".join(filter(None, (candidate.name if len(candidates) > 1 else "", key))): value
        for candidate, one, metrics in measured
        for key, value in flat(one.data_set, one.task, metrics).items()
    }


def _candidates(given: str | Sequence[str]) -> list[Candidate]:
    """Find the models on rank 0 alone: one rank fetches what has to be fetched, and all use the same."""
    found = find(given) if rank() == 0 else []
    return [Candidate(*candidate) for candidate in of_rank_zero(found)]


def _first_rank_first(prepare: Callable[[], Any] | None) -> None:
    """Let rank 0 make a data set before the others find it made."""
    if prepare is None:
        return
    if rank() == 0:
        prepare()
    barrier()
    if rank() != 0:
        prepare()


def _benchmark(config: DictConfig, device: str) -> list[Work]:
    benchmark: Any = OmegaConf.to_container(config.benchmark, resolve=True, throw_on_missing=True)
    tasks = {task: _plain(config.tasks[task]) if task in benchmark["tasks"] else None for task in config.tasks}
    return works_of(benchmark, tasks, device)


def _evaluators(config: DictConfig, device: str) -> list[Work]:
    if not config.evaluators:
        raise InputError("evaluators is empty; give evaluators=... or benchmark=...")
    return [work("", str(name), _plain(config.evaluators[name]), device) for name in config.evaluators]


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def _write(output: Path, name: str, measured: Sequence[Measured]) -> None:
    rows = rows_of(measured)
    table, page = output.with_suffix(".csv"), output.with_suffix(".html")
    write_whole(table, csv_text(rows))
    write_comparison(page, name, rows)
    write_whole(output, json_text(name, measured))
    print(f"written to {output}, {table} and {page}", file=sys.stderr)
