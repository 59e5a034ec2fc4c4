"""`mmpretrain evaluate`: saved models, evaluators or a benchmark, and the numbers in files."""

from __future__ import annotations

import json
import os
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
from mmpretrain.evaluation.console import show
from mmpretrain.evaluation.results import Results, Work, work
from mmpretrain.evaluation.suite import run_suite
from mmpretrain.evaluation.tables import csv_text, flat, json_text, rows_of
from mmpretrain.whole_file import write_whole

BESIDE = (".csv", ".html", ".parts")
"""What ends the names of what a comparison writes beside its output."""


def evaluate(config: DictConfig) -> dict[str, float]:
    """Evaluate what `config.checkpoint` names (see configs/evaluate.yaml); return, and write on rank 0, the metrics.

    One model with evaluators gives one JSON of metrics. A list, pattern or folder of models, or a benchmark, gives
    JSON, CSV and a page that compares, and goes on where it was stopped. Under torchrun every rank takes its share.
    """
    for key in ("checkpoint", "output"):
        if config[key] is None:
            raise InputError(f"{key}=null; give {key}=PATH")
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
        _check_output([output], bool(config.overwrite))
        pretrained = candidates[0].load(device, tuple(config.allow_targets))
        _first_rank_first(partial(build, config.prepare) if config.prepare is not None else None)
        metrics = run_evaluators(pretrained, build(config.evaluators))
        if rank() == 0:
            write_metrics(output, metrics)
            print(f"written to {output}", file=sys.stderr)
            if config.json:
                print(json.dumps(metrics, indent=1, sort_keys=True))
            else:
                show(metrics)
        return metrics


def _suite(
    config: DictConfig, candidates: Sequence[Candidate], device: str, build: Callable[..., Any]
) -> dict[str, float]:
    output = Path(config.output)
    table, page, parts = (output.with_name(output.name.removesuffix(".json") + ending) for ending in BESIDE)
    benchmark = config.get("benchmark")
    name = "evaluators" if benchmark is None else benchmark.name
    _check_output([output, table, page], bool(config.overwrite) or (parts.is_dir() and _is_of(output, name)))
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
    metrics = {
        "/".join(filter(None, (candidate.name if len(candidates) > 1 else "", key))): value
        for candidate, one, of_one in measured
        for key, value in flat(one.data_set, one.task, of_one).items()
    }
    if rank() == 0:
        from mmpretrain.evaluation.compare import write_comparison  # it imports matplotlib

        rows = rows_of(measured)
        write_whole(table, csv_text(rows))
        write_comparison(page, name, rows)
        write_whole(output, json_text(name, measured))
        print(f"written to {output}, {table} and {page}", file=sys.stderr)
        if config.json:
            print(output.read_text(encoding="utf-8"), end="")
        else:
            show(metrics)
    barrier()
    return metrics


def _is_of(output: Path, benchmark: str) -> bool:
    """Whether `output` is the JSON of this benchmark, or not there."""
    try:
        return bool(json.loads(output.read_text(encoding="utf-8"))["benchmark"] == benchmark)
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_output(files: Sequence[Path], replace: bool) -> None:
    """Raise `InputError`, on every rank, where what is measured could not be written, or would replace other files."""
    problem, folder = None, files[0].parent
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if found := next((file for file in files if file.is_dir()), None):
            problem = f"{found} is a folder; give another output=, the name of a file"
        elif not replace and (found := next((file for file in files if file.exists()), None)):
            problem = f"{found} exists; give another output=, or overwrite=true"
        elif not os.access(folder, os.W_OK):
            problem = f"{folder.resolve()} cannot be written to; give another output="
    if (problem := of_rank_zero(problem)) is not None:
        raise InputError(problem)


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
