"""A batch that does not fit in memory, in pieces, with exactly the gradients of the whole."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from mmpretrain.model import MultimodalModel
from mmpretrain.types import Batch, Outputs, Prediction


def forward_in_micro_batches(model: MultimodalModel, batch: Batch, micro_batch_size: int) -> Outputs:
    """Run the model over pieces of (micro_batch_size,...) rows, keeping only embeddings and fused tokens of each.

    The outputs are those of the whole batch, so a loss sees every negative, and the logit scale gets its gradient
    once. The backward pass recomputes one piece at a time with the random state it had (patch dropout, dropout), as
    GradCache does (Gao et al. 2021); peak memory is one piece's activations, the cost one more forward pass.
    """
    size = len(next(iter(batch.values())).values)
    if size <= micro_batch_size:
        outputs: Outputs = model(batch)
        return outputs
    pieces = [_rows(batch, slice(start, start + micro_batch_size)) for start in range(0, size, micro_batch_size)]
    parts: list[Outputs] = [checkpoint(model, piece, use_reentrant=False) for piece in pieces]
    first = parts[0]
    return Outputs(
        embeddings={m: torch.cat([part.embeddings[m] for part in parts]) for m in first.embeddings},
        logit_scale=first.logit_scale,
        logit_bias=first.logit_bias,
        predictions={name: _joined([part.predictions[name] for part in parts]) for name in first.predictions},
        identities={m: torch.cat([part.identities[m] for part in parts]) for m in first.identities},
    )


def _rows(batch: Batch, rows: slice) -> Batch:
    return {m: p.rows(rows) for m, p in batch.items()}


def _joined(parts: list[Prediction]) -> Prediction:
    """Join what pieces predict, packed or not: hidden (P,D), labels (P,)."""
    return Prediction(
        torch.cat([part.hidden.flatten(0, -2) for part in parts]),
        parts[0].weight,
        torch.cat([part.labels.flatten() for part in parts]),
    )
