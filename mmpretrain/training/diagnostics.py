"""What tells a sick run from a healthy one: gradients, logits, and the shape of the embeddings, at logged steps."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmpretrain.errors import InputError

ROWS = 1024
"""Rows of a rank's batch that are looked at, at most: (ROWS,ROWS) logits and a (ROWS,E) decomposition."""


class Diagnostics(Callback):
    """Adds to `module.history`, at steps that are logged, what `Metrics` then logs as the mean over ranks.

    `grad_norm/<part>`: norm of the gradient, over all ranks and before clipping, of each encoder, and of fusion,
    heads and projections. For each pair of modalities of this rank's batch: `logits/<a>-<b>/positive` (mean),
    `negative` (mean) and `hardest_negative` (maximum), and `modality_gap/<a>-<b>`. `embedding_rank/<modality>`.
    Where a step has several sources, their name stands before the pair or modality. `temperature` is 1 / logit scale.

    It must come before `NonFiniteGuard` (which takes the gradients of a bad step away) and before `Metrics`.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise InputError(f"callbacks.log_every_n_steps is {every_n_steps}; give at least 1")
        self.every_n_steps = every_n_steps

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Measure, where this step will be logged."""
        step = trainer.global_step + 1
        if step % self.every_n_steps and step != trainer.max_steps:
            return
        found = {f"grad_norm/{name}": gradient_norm(part) for name, part in parts(module.model).items()}
        found["temperature"] = 1 / module.history["logit_scale"]
        for source, embeddings in module.embeddings.items():
            prefix = f"{source}/" if len(module.embeddings) > 1 else ""
            found |= measure(embeddings, module.history["logit_scale"], module.history.get("logit_bias"), prefix)
        module.history |= found


def parts(model: Any) -> dict[str, nn.Module]:
    """Name the parts of a model whose gradients are told apart, leaving out what is frozen whole."""
    named = {**model.encoders, "projections": model.projections, "fusion": model.fusion, "heads": model.heads}
    return {
        name: part
        for name, part in named.items()
        if part is not None and any(p.requires_grad for p in part.parameters())
    }


def gradient_norm(part: nn.Module) -> Tensor:
    """Norm of a part's whole gradient as a 0-d tensor; shards of other ranks are counted in."""
    gradients = [p.grad for p in part.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norm.to(next(part.parameters()).device)


def measure(
    embeddings: Mapping[str, Tensor], scale: Tensor, bias: Tensor | None, prefix: str = ""
) -> dict[str, Tensor]:
    """Describe paired embeddings, modality -> (B,E) unit rows, of which the first `ROWS` are taken."""
    rows = {m: e[:ROWS].to(torch.promote_types(e.dtype, torch.float32)) for m, e in embeddings.items()}
    found = {f"embedding_rank/{prefix}{m}": effective_rank(e) for m, e in rows.items()}
    for a, b in combinations(rows, 2):
        logits = scale * rows[a] @ rows[b].T + (0.0 if bias is None else bias)
        found[f"logits/{prefix}{a}-{b}/positive"] = logits.diagonal().mean()
        if (size := len(logits)) > 1:
            others = logits[~torch.eye(size, dtype=torch.bool, device=logits.device)]
            found[f"logits/{prefix}{a}-{b}/negative"] = others.mean()
            found[f"logits/{prefix}{a}-{b}/hardest_negative"] = others.max()
        found[f"modality_gap/{prefix}{a}-{b}"] = (rows[a].mean(0) - rows[b].mean(0)).norm()
    return found


def effective_rank(embeddings: Tensor) -> Tensor:
    """RankMe (Garrido et al. 2023): the exponential of the entropy of the normalised singular values of (B,E).

    From 1 (all rows on one line) to min(B, E); NaN where a value is not finite.
    """
    values = torch.linalg.svdvals(embeddings.nan_to_num(0, 0, 0))
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    rank = torch.special.entr(shares).sum().exp()
    return torch.where(embeddings.isfinite().all(), rank, torch.nan)
