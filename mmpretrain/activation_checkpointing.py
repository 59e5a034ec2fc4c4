"""Activation checkpointing: a model's repeated blocks keep little for the backward pass and compute the rest again.

No number changes: what is computed again has the random state it had (patch dropout, dropout).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mmpretrain.errors import InputError
from mmpretrain.layers import Block, CrossBlock

Checkpointing = Literal["full", "selective"]

_ATEN = torch.ops.aten
COSTLY = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_mm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    *([torch.ops.torch_attn._varlen_attn.default] if hasattr(torch.ops.torch_attn, "_varlen_attn") else []),
}
"""Operators whose results `selective` keeps."""

# What is kept goes the way of all saved tensors (to be counted, or offloaded); in older torch it does not.
_KNOWN = inspect.signature(checkpoint).parameters
_OUTER_HOOKS = {"respect_saved_tensors_hooks": True} if "respect_saved_tensors_hooks" in _KNOWN else {}


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """List the parts a model repeats: our blocks, and those of timm's `blocks` and `stages`, none inside another."""
    found = dict.fromkeys(_candidates(model))
    return [block for block in found if not any(part in found for part in block.modules() if part is not block)]


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (Block, CrossBlock)):
            yield module
        for name in ("blocks", "stages"):
            parts = getattr(module, name, None)
            if isinstance(parts, (nn.Sequential, nn.ModuleList)):
                yield from (part for part in parts if not isinstance(part, nn.ModuleList))  # a list is never called


def checkpoint_activations(model: nn.Module, mode: Checkpointing) -> None:
    """Let every repeated block keep its input alone (`full`), or its input and what is costly to compute (`selective`).

    `selective` keeps what matrix products, convolutions and attention give, so that only what lies between them (norms,
    activations, sums) is computed twice. It works in training mode, where gradients are asked for, and changes no name
    of a parameter. Blocks with batch norm, whose averages would be updated twice, keep what they kept. Raises
    `InputError` for another mode, and for a model without blocks.
    """
    if mode not in get_args(Checkpointing):
        raise InputError(f"activation checkpointing is {mode!r}; choose one of {', '.join(get_args(Checkpointing))}")
    blocks = [block for block in repeated_blocks(model) if not any(isinstance(m, _BatchNorm) for m in block.modules())]
    if not blocks:
        raise InputError("this model has no repeated blocks (without batch norm) whose activations could be recomputed")
    for block in blocks:
        if not isinstance(block.__dict__.get("forward"), _Recomputed):
            block.forward = _Recomputed(block, mode)


class _Recomputed:
    """A block's `forward` that forgets what it computed; it stands in the block's own attributes, where torch looks."""

    def __init__(self, block: nn.Module, mode: Checkpointing) -> None:
        self.block, self.forward = block, type(block).forward
        self.options: dict[str, Any] = {} if mode == "full" else {"context_fn": _selective, **_OUTER_HOOKS}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.block.training and torch.is_grad_enabled()):
            return self.forward(self.block, *args, **kwargs)
        call = partial(self.forward, self.block)
        return checkpoint(call, *args, use_reentrant=False, **self.options, **kwargs)


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
