"""Tiny saved models, a run with checkpoints, a suite of every task on digits; imports little, as ranks import it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from mmpretrain.config import instantiate
from mmpretrain.distributed import barrier, rank
from mmpretrain.evaluation.benchmark import works_of
from mmpretrain.evaluation.candidates import find
from mmpretrain.evaluation.results import Results
from mmpretrain.evaluation.suite import run_suite
from mmpretrain.pretrained import save
from mmpretrain.training.checkpoint import save as save_checkpoint
from tests.test_pretrained import CONFIG


def built(seed: int) -> Any:
    torch.manual_seed(seed)
    return instantiate(copy.deepcopy(CONFIG["model"]))


def save_model(folder: Path, seed: int = 0) -> Path:
    return save(folder, built(seed), CONFIG)


def save_run(folder: Path, steps: tuple[int, ...] = (10, 20, 30)) -> Path:
    """A run folder with a checkpoint of other weights at each step, and the last as its model."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    parts = {"model": CONFIG["model"], "tokenizer": CONFIG["tokenizer"], "data": {"preprocess": CONFIG["preprocess"]}}
    OmegaConf.save(OmegaConf.create(parts), folder / "config.yaml")
    for step in steps:
        weights = {f"model.{name}": tensor for name, tensor in built(step).state_dict().items()}
        state = {"state_dict": weights, "global_step": step, "optimizer_states": [{"state": torch.ones(5)}]}
        save_checkpoint(checkpoints, state, step, keep=len(steps))
    save_model(folder / "model", steps[-1])
    (folder / "manifest.json").write_text("{}")  # of the run, as its checkpoints have one
    (folder / "metrics.json").write_text(f'{{"train/steps": {steps[-1]}.0}}')
    return folder


def task(name: str, batch_size: int = 64, num_workers: int = 0) -> dict[str, Any]:
    data = {"_target_": "mmpretrain.evaluation.BenchmarkData", "_partial_": True, "root": "{root}", "name": "{name}"}
    speed = {"batch_size": batch_size, "num_workers": num_workers}
    train = {**data, "split": "train"}
    tasks: dict[str, dict[str, Any]] = {
        "zero_shot": {"_target_": "mmpretrain.evaluation.ZeroShotClassification", "data": data},
        "linear_probe": {
            "_target_": "mmpretrain.evaluation.LinearProbe",
            "train": train,
            "data": data,
            "max_iterations": 20,
        },
        "knn": {"_target_": "mmpretrain.evaluation.NearestNeighbours", "train": train, "data": data},
        "retrieval": {"_target_": "mmpretrain.evaluation.Retrieval", "data": data},
    }
    return {**tasks[name], **speed}


CLASSIFYING = ("zero_shot", "linear_probe", "knn")


def measure(
    root: str, models: list[str], parts: str, batch_size: int = 64, num_workers: int = 0, stop_after: int | None = None
) -> list[Any]:
    """Measure models on the data sets `digits` and `captions` of `root`; each rank returns [model, task, metrics].

    `stop_after`: so many evaluators are built before something else ends the process.
    """
    started = 0

    def build(work: Any) -> Any:
        nonlocal started
        if started == stop_after:
            raise KeyboardInterrupt
        started += 1
        return instantiate(work.config)

    tasks = {name: task(name, batch_size, num_workers) for name in (*CLASSIFYING, "retrieval")}
    works = [
        *works_of({"root": root, "data_sets": ["captions"], "tasks": ["retrieval"]}, tasks, "cpu"),
        *works_of({"root": root, "data_sets": ["digits"], "tasks": CLASSIFYING}, tasks, "cpu"),
    ]
    if rank() == 0:
        Path(parts).mkdir(exist_ok=True)
    barrier()
    measured = run_suite(find(models), works, Results(Path(parts)), lambda one: one.load("cpu"), build)
    return [[candidate.name, work.task, metrics] for candidate, work, metrics in measured]
