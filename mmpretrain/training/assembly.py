"""Which callbacks a run has, and in which order they act at a step: the order is part of what they promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback
from omegaconf import DictConfig

from mmpretrain.errors import InputError
from mmpretrain.training.best import KeepBest
from mmpretrain.training.callbacks import Evaluation, Metrics, ProgressLine
from mmpretrain.training.data_log import DataLog
from mmpretrain.training.diagnostics import Diagnostics
from mmpretrain.training.ema import EMA
from mmpretrain.training.guard import NonFiniteGuard
from mmpretrain.training.preemption import Preemption
from mmpretrain.training.saving import Checkpoints
from mmpretrain.training.watchdog import Watchdog
from mmpretrain.types import Tokenizer


class Assembly(NamedTuple):
    """The callbacks of a run by what they do."""

    diagnostics: Diagnostics
    guard: NonFiniteGuard
    ema: EMA | None
    metrics: Metrics
    data_log: DataLog
    progress: ProgressLine
    checkpoints: Checkpoints
    evaluation: Evaluation
    keep_best: KeepBest | None
    extra: list[Callback]
    preemption: Preemption
    watchdog: Watchdog

    def in_order(self) -> list[Callback]:
        """List them as they act: gradients are measured before the guard takes a bad step's away; what a checkpoint
        holds is up to date before it is saved; the watchdog's clock covers all of them."""
        listed = [part for part in self if isinstance(part, Callback)]
        return [*listed[:-2], *self.extra, *listed[-2:]]


def assemble(
    config: DictConfig,
    folder: Path,
    checkpoints: Path,
    preemption: Preemption,
    build: Callable[..., Any],
    tokenizer: Tokenizer,
) -> Assembly:
    """Build the callbacks that `config.callbacks`, `config.debug` and `config.evaluators` describe."""
    wanted = config.callbacks
    every = wanted.log_every_n_steps
    if wanted.best.monitor is not None and not wanted.evaluate_every_n_steps:
        raise InputError("callbacks.best needs evaluations during training; set callbacks.evaluate_every_n_steps")
    ema = None if wanted.ema.decay is None else EMA(wanted.ema.decay, wanted.ema.warmup)
    saves = Checkpoints(checkpoints, wanted.checkpoint_every_n_steps, **wanted.checkpoints)
    intervals = [wanted.checkpoint_every_n_steps, *([wanted.evaluate_every_n_steps] if wanted.best.monitor else [])]
    data_log = DataLog(folder, config.debug.sample_log, every, intervals)
    return Assembly(
        diagnostics=Diagnostics(every),
        guard=NonFiniteGuard(data_log, saves, **wanted.bad_steps, check_every_n_steps=every, saves=intervals),
        ema=ema,
        metrics=Metrics(every),
        data_log=data_log,
        progress=ProgressLine(),
        checkpoints=saves,
        evaluation=Evaluation(
            build(config.evaluators),
            build(config.data.preprocess),
            tokenizer,
            wanted.evaluate_every_n_steps,
            wanted.best.monitor,
            ema,
        ),
        keep_best=None if wanted.best.monitor is None else KeepBest(saves, wanted.best.monitor, wanted.best.mode),
        extra=build(wanted.extra),
        preemption=preemption,
        watchdog=Watchdog(wanted.watchdog_seconds, folder),
    )
