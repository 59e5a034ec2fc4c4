"""Keeping the checkpoint with the best value of a metric."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mmpretrain.distributed import any_rank, rank
from mmpretrain.errors import InputError
from mmpretrain.training.folder import best_value
from mmpretrain.training.saving import Checkpoints


class KeepBest(Callback):
    """Saves where an evaluation gave the best value so far of `monitor`, and points `best` at it; after `Evaluation`.

    The value lies in `best.json` beside the link, so that a resumed run compares with it.
    """

    def __init__(self, checkpoints: Checkpoints, monitor: str, mode: str = "max") -> None:
        if mode not in ("max", "min"):
            raise InputError(f"callbacks.best.mode is {mode!r}; give max or min")
        self.checkpoints, self.monitor, self.mode = checkpoints, monitor, mode
        self.value: float | None = None
        self._seen: Tensor | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Take up the value of the best checkpoint that is still there."""
        self.value = best_value(self.checkpoints.folder, self.monitor, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Save and point at this step if it was evaluated and is the best."""
        value = trainer.callback_metrics.get(self.monitor)
        if value is None or value is self._seen:
            return
        self._seen = value
        now = float(value)
        better = self.value is None or (now > self.value if self.mode == "max" else now < self.value)
        if not any_rank(rank() == 0 and math.isfinite(now) and better):
            return
        self.value = now
        self.checkpoints.save(trainer)
        if rank() == 0:
            self.checkpoints.io.mark_best(self.checkpoints.folder, trainer.global_step, self.monitor, now)
