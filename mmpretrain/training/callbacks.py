"""What happens around the steps: measuring, the progress line, evaluation."""

from __future__ import annotations

import difflib
import time
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mmpretrain.distributed import sum_over_ranks, world_size
from mmpretrain.errors import InputError
from mmpretrain.evaluation.run import Evaluators, run_evaluators
from mmpretrain.pretrained import Pretrained
from mmpretrain.training.compilation import uncompiled
from mmpretrain.training.ema import EMA
from mmpretrain.training.watchdog import paused
from mmpretrain.types import Tokenizer


class Metrics(Callback):
    """Log losses (mean over ranks), logit scale, learning rate and throughput every `every_n_steps`, and at the end.

    Numbers are read from the device only at logged steps, so that other steps need not wait for it.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise InputError(f"callbacks.log_every_n_steps is {every_n_steps}; give at least 1")
        self.every_n_steps = every_n_steps
        self.since: tuple[float, int] | None = None
        self.latest: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        """Start the clock at the first step."""
        if self.since is None:
            self.since = (time.perf_counter(), trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Log this step if it is one to log."""
        step = trainer.global_step
        if self.since is None or (step % self.every_n_steps and step != trainer.max_steps):
            return
        # One sum over ranks and one read, however many numbers: each read waits until the device is done.
        values = torch.stack([value.reshape(()).double() for value in module.history.values()])
        means = (sum_over_ranks(values) / world_size()).tolist()
        self.latest = dict(zip(module.history, means, strict=True))
        self.latest["lr"] = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        now, (then, first) = time.perf_counter(), self.since
        samples = (step - first) * trainer.datamodule.global_batch_size * len(batch.batches)  # type: ignore[attr-defined]
        self.latest["samples_per_second"] = samples / max(now - then, 1e-9)
        self.since = (now, step)
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=step)

    def pause(self) -> None:
        """Leave what follows (an evaluation) out of the throughput."""
        self.since = None


class ProgressLine(ProgressBar):
    """Step, samples/s, loss and time left: a live bar in a terminal, a line now and then elsewhere."""

    def __init__(self, lines: int = 10) -> None:
        super().__init__()
        self.lines = lines
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.enabled = True

    def disable(self) -> None:
        """Show nothing (ranks other than 0)."""
        self.enabled = False

    def enable(self) -> None:
        """Show progress."""
        self.enabled = True

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar."""
        self.started = (time.perf_counter(), trainer.global_step)
        if self.enabled and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, numbers="")
            self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Move on."""
        if not self.enabled:
            return
        step, numbers = trainer.global_step, self._numbers(trainer)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, numbers=numbers)
        elif step % max(1, trainer.max_steps // self.lines) == 0 or step == trainer.max_steps:
            then, first = self.started
            left = (time.perf_counter() - then) / max(1, step - first) * (trainer.max_steps - step)
            self.console.print(f"step {step}/{trainer.max_steps}  {numbers}  left {left:.0f} s", highlight=False)

    def _numbers(self, trainer: Trainer) -> str:
        latest = next((c.latest for c in trainer.callbacks if isinstance(c, Metrics)), {})  # type: ignore[attr-defined]
        if not latest:
            return ""
        return f"{latest['samples_per_second']:.0f} samples/s  loss {latest['loss/total']:.3f}"

    def close(self) -> None:
        """Close the bar, whatever ended the run."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Close the bar."""
        self.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self.close()


class Evaluation(Callback):
    """Run the evaluators every `every_n_steps` (0: only at the end) and log `val/<evaluator>/<metric>`.

    Every rank takes part, each with its share. The values also reach `trainer.callback_metrics`, where a checkpoint
    callback finds the metric it keeps the best by.
    """

    def __init__(
        self,
        evaluators: Evaluators,
        preprocess: Any,
        tokenizer: Tokenizer,
        every_n_steps: int = 0,
        monitor: str | None = None,
        ema: EMA | None = None,
    ) -> None:
        self.monitor, self.ema = monitor, ema
        self.evaluators, self.preprocess, self.tokenizer = evaluators, preprocess, tokenizer
        self.every_n_steps = every_n_steps
        self.metrics: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Evaluate where it is time, the last step included."""
        step = trainer.global_step
        due = self.every_n_steps > 0 and step % self.every_n_steps == 0
        if not (due or step == trainer.max_steps):
            return
        with paused(trainer, "evaluating"):
            self.evaluate(trainer, module)

    def evaluate(self, trainer: Trainer, module: Any) -> None:
        """Run the evaluators, on the moving average of the weights where there is one, and log the values."""
        pretrained = Pretrained(module.model, self.preprocess, self.tokenizer)
        with uncompiled(), nullcontext() if self.ema is None else self.ema.applied(module.model):
            found = run_evaluators(pretrained, self.evaluators)
        self.metrics = {f"val/{name}": value for name, value in found.items()}
        if self.monitor is not None and self.monitor not in self.metrics:
            close = difflib.get_close_matches(self.monitor, self.metrics, n=3, cutoff=0.3)
            raise InputError(
                f"callbacks.best.monitor is {self.monitor!r}; nearest metrics: {', '.join(close) or 'none'}"
            )
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(
                {k: v for k, v in self.metrics.items() if k.count("/ci_") == 0}, step=trainer.global_step
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Metrics):
                callback.pause()

    def check_data(self) -> None:
        """Open every evaluator's data once, so that what is missing is said before training and not after."""
        for evaluator in self.evaluators.values():
            if hasattr(evaluator, "data"):
                evaluator.data(transform=self.preprocess)
