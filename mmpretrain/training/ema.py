"""The exponential moving average of the weights, for evaluation and for the model that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmpretrain.errors import InputError


class EMA(Callback):
    """Averages the trainable weights after each step: average = d * average + (1 - d) * weights, in float32 or finer.

    d is `decay`; with `warmup` it is min(decay, (1 + t) / (10 + t)) after t updates, so that the average soon forgets
    the initial weights. A skipped step is no update. Buffers and frozen parameters are not averaged: those of the
    model serve. The state is part of a checkpoint. The host never waits for the device.

    Raises `InputError` for a decay outside [0, 1) and for parameters that are sharded over ranks (FSDP2).
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"callbacks.ema.decay is {decay}; expected at least 0 and less than 1, or null for none")
        self.decay, self.warmup = decay, warmup
        self.average: dict[str, Tensor] = {}
        self.updates = torch.zeros(())

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Begin with the weights as they are, or with the average of the checkpoint that training goes on from."""
        weights = _weights(module.model)
        if any(isinstance(weight, DTensor) for weight in weights.values()):
            raise InputError(
                "callbacks.ema averages whole weights, these are sharded (FSDP2); set callbacks.ema.decay=null or "
                "trainer=ddp"
            )
        if self.average and set(self.average) != set(weights):
            differing = sorted(set(self.average) ^ set(weights))
            raise InputError(
                f"the checkpoint's average and the model differ in the weights {', '.join(differing[:5])}; go on with "
                "the config the checkpoint was written with"
            )
        started = self.average or weights
        self.average = {name: _fine(started[name]).to(weight.device) for name, weight in weights.items()}
        self.updates = self.updates.to(module.device)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Move the average towards the weights, unless the step was skipped."""
        done = torch.ones_like(self.updates) if module.skipped is None else 1 - module.skipped
        decay = torch.full_like(self.updates, self.decay)
        if self.warmup:
            decay = torch.minimum(decay, (1 + self.updates) / (10 + self.updates))
        weight = (1 - decay) * done
        for name, current in _weights(module.model).items():
            average = self.average[name]
            average.lerp_(current.to(average.dtype), weight.to(average.dtype))
        self.updates += done

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give `model` the averaged weights inside the `with` block, and its own back, bit for bit, after it."""
        if not self.average:  # training has not begun
            yield
            return
        weights = _weights(model)
        own = {name: weight.clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """The average and the count of updates, as tensors that go on changing: copy them before the next step."""
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`, on the device where the average lies by now, if any."""
        old = self.average
        self.average = {
            name: _fine(value).to(old[name].device if name in old else value.device)
            for name, value in state_dict["average"].items()
        }
        self.updates = state_dict["updates"].detach().clone().to(self.updates.device)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _fine(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
