"""Keeping what a model could do: distance to the frozen original that fine-tuning began with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.distributed import gather
from mmpretrain.errors import InputError
from mmpretrain.losses.contrastive import embedding_pair
from mmpretrain.types import Outputs


def preservation_loss(embeddings: Tensor, original: Tensor) -> Tensor:
    """Mean over rows of 1 - cosine (half the squared distance) between unit embeddings (B,E) and the original's."""
    # A small distance is what half precision loses of a cosine near 1.
    with torch.autocast(embeddings.device.type, enabled=False):
        precision = torch.promote_types(embeddings.dtype, torch.float32)
        distances: Tensor = 1 - torch.linalg.vecdot(embeddings.to(precision), original.to(precision))
        return distances.mean()


def similarity_preservation_loss(
    a: Tensor, all_b: Tensor, scale: Tensor, original_a: Tensor, original_all_b: Tensor, original_scale: Tensor
) -> Tensor:
    """Mean over rows of KL(original || model) of the softmax of similarities, a (B,E) against all_b (G,E).

    Distillation of the original's answers (Hinton et al. 2015), each side at its own logit scale.
    """
    with torch.autocast(a.device.type, enabled=False):
        log_now = F.log_softmax(scale * a @ all_b.T, dim=1)
        log_before = F.log_softmax(original_scale * original_a @ original_all_b.T, dim=1)
        return F.kl_div(log_now, log_before, reduction="batchmean", log_target=True)


class PreservationLoss:
    """Mean distance 1 - cosine of each modality's embeddings to those of the frozen original, over the batch.

    `modalities`: which; None is all that both give. Raises `InputError` where there is no original, or a modality is
    missing. Averaged over ranks of equal batches it is the loss of the global batch.
    """

    needs_original = True
    """Training then runs the original on each batch as well."""

    def __init__(self, modalities: Sequence[str] | None = None) -> None:
        self.modalities = None if modalities is None else list(modalities)

    def __call__(self, outputs: Outputs) -> Tensor:
        """Compute this rank's share."""
        original = _original(outputs)
        modalities = list(outputs.embeddings) if self.modalities is None else self.modalities
        missing = [m for m in modalities if m not in outputs.embeddings or m not in original.embeddings]
        if missing or not modalities:
            raise InputError(
                f"preservation of {missing} is asked for, there are {sorted(outputs.embeddings)}; change `modalities`"
            )
        losses = [preservation_loss(outputs.embeddings[m], original.embeddings[m].detach()) for m in modalities]
        return torch.stack(losses).mean()


class SimilarityPreservationLoss:
    """Keeps the original's answers: KL of its softmax over the global batch to the model's, mean of both directions.

    `a`, `b`: modality names. It holds the (B,G) similarities several times. `scale`: "own" uses the model's logit
    scale, "original" the frozen one on both sides, so that a sharper temperature is no difference.
    """

    needs_original = True

    def __init__(self, a: str = "image", b: str = "text", scale: str = "own") -> None:
        if scale not in ("own", "original"):
            raise InputError(f'scale is {scale!r}; give "own" or "original"')
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, outputs: Outputs) -> Tensor:
        """Compute this rank's share, whose mean over ranks is the loss of the global batch."""
        original = _original(outputs)
        a, b = embedding_pair(outputs, self.a, self.b)
        old_a, old_b = (e.detach() for e in embedding_pair(original, self.a, self.b))
        before = original.logit_scale.detach()
        now = before if self.scale == "original" else outputs.logit_scale
        forward = similarity_preservation_loss(a, gather(b), now, old_a, gather(old_b), before)
        backward = similarity_preservation_loss(b, gather(a), now, old_b, gather(old_a), before)
        return (forward + backward) / 2


def _original(outputs: Outputs) -> Outputs:
    if outputs.original is None:
        raise InputError("there is no original to preserve; begin with a whole saved model: init=MODEL")
    return outputs.original
