"""Which parameters decay, and how the learning rate moves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mmpretrain.errors import InputError
from mmpretrain.training.layer_decay import with_layer_decay


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Split trainable parameters into those that decay and those that do not, and by layer with `layer_decay`.

    What has fewer than two dimensions of a size above 1 (gains, biases, class tokens, logit scale and bias) is not
    decayed, nor are timm's (1,N,D) position tables, as timm has it; all other weights are.
    """
    groups = [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays in (True, False)
        if (parameters := [p for _, p in _trainable(model) if _decays(p) is decays])
    ]
    return with_layer_decay(groups, model, layer_decay)


def muon_groups(model: nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Split for timm's Muon: hidden matrices by Muon, everything else by its AdamW fallback.

    Embeddings, output heads, positions, patch convolutions, gains, biases and the logit scale are no hidden matrices
    (Jordan 2024). A group marked `use_fallback` is updated by AdamW.
    """
    hidden, rest, plain = [], [], []
    outer = _outer_weights(model)
    for _, parameter in _trainable(model):
        if not _decays(parameter):
            plain.append(parameter)
        elif parameter.ndim == 2 and id(parameter) not in outer:
            hidden.append(parameter)
        else:
            rest.append(parameter)
    groups = [
        {"params": hidden, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": weight_decay, "use_fallback": True},
        {"params": plain, "weight_decay": 0.0, "use_fallback": True},
    ]
    return with_layer_decay([group for group in groups if group["params"]], model, layer_decay)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int, final_factor: float = 0.0
) -> LambdaLR:
    """Rise linearly over `warmup_steps`, then follow half a cosine down to `final_factor` of the peak."""
    _check_steps(total_steps, warmup_steps=warmup_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def constant_with_cooldown(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    warmup_steps: int,
    cooldown_steps: int,
    final_factor: float = 0.0,
) -> LambdaLR:
    """Rise over `warmup_steps`, stay, then fall linearly to `final_factor` over the last `cooldown_steps`."""
    _check_steps(total_steps, warmup_steps=warmup_steps, cooldown_steps=cooldown_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        left = max(0, total_steps - step)
        return final_factor + (1 - final_factor) * min(1.0, left / max(1, cooldown_steps))

    return LambdaLR(optimizer, factor)


def _check_steps(total_steps: int, **parts: int) -> None:
    if total_steps < 1 or any(steps < 0 for steps in parts.values()) or sum(parts.values()) > total_steps:
        given = ", ".join(f"{name}={steps}" for name, steps in parts.items())
        raise InputError(f"{given} do not fit into {total_steps} training steps; lower them or raise trainer.max_steps")


def _trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _decays(parameter: nn.Parameter) -> bool:
    return sum(size > 1 for size in parameter.shape) >= 2 and not _is_position_table(parameter)


def _is_position_table(parameter: nn.Parameter) -> bool:
    """Recognise timm's (1,N,D) position tables; no weight matrix or kernel has a leading 1 and three dimensions."""
    return parameter.ndim == 3 and parameter.shape[0] == 1


def _outer_weights(model: nn.Module) -> set[int]:
    """Ids of parameters at the model's edges: embeddings, and parameters held directly by a module (tables, heads)."""
    outer = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(module, nn.Linear):
                outer.add(id(parameter))
    return outer
