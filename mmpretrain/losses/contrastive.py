"""Symmetric InfoNCE (CLIP), with one or several positives for each row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.distributed import gather, rank
from mmpretrain.errors import InputError
from mmpretrain.types import Outputs


def contrastive_loss(
    a: Tensor, b: Tensor, all_a: Tensor, all_b: Tensor, logit_scale: Tensor, offset: int = 0
) -> Tensor:
    """Symmetric InfoNCE of local rows (B,E) against all rows (G,E); row i's positive is row `offset + i`.

    Mean over the B rows and both directions (Radford et al. 2021, figure 3). With one process `all_a` is `a` and
    `all_b` is `b`; else averaging over ranks gives the loss of the global batch.
    """
    labels = torch.arange(offset, offset + len(a), device=a.device)
    return _symmetric_cross_entropy(a, b, all_a, all_b, logit_scale, labels)


def multi_positive_contrastive_loss(
    a: Tensor, b: Tensor, all_a: Tensor, all_b: Tensor, logit_scale: Tensor, positives: Tensor
) -> Tensor:
    """Symmetric InfoNCE in which a row's positives share its probability evenly (Khosla et al. 2020, equation 2).

    `positives` (B,G) bool, at least one True in each row; with exactly one this equals `contrastive_loss`.
    """
    target = positives / positives.sum(1, keepdim=True)
    target = target.to(torch.promote_types(a.dtype, torch.float32))
    return _symmetric_cross_entropy(a, b, all_a, all_b, logit_scale, target)


def _symmetric_cross_entropy(
    a: Tensor, b: Tensor, all_a: Tensor, all_b: Tensor, logit_scale: Tensor, target: Tensor
) -> Tensor:
    # Half precision cannot resolve a similarity at scale 100, so autocast must not reach these products.
    with torch.autocast(a.device.type, enabled=False):
        logits_a = logit_scale * a @ all_b.T
        logits_b = logit_scale * b @ all_a.T
        return (F.cross_entropy(logits_a, target) + F.cross_entropy(logits_b, target)) / 2


class ContrastiveLoss:
    """Symmetric InfoNCE between two modalities over the global batch.

    `a`, `b`: modality names. Raises `InputError` where the model's outputs lack one of them.
    """

    def __init__(self, a: str = "image", b: str = "text") -> None:
        self.a, self.b = a, b

    def __call__(self, outputs: Outputs) -> Tensor:
        """Compute this rank's share, whose mean over ranks is the loss of the global batch."""
        a, b = embedding_pair(outputs, self.a, self.b)
        return contrastive_loss(a, b, gather(a), gather(b), outputs.logit_scale, rank() * len(a))


class MultiPositiveContrastiveLoss:
    """InfoNCE in which samples that carry the same ids in modality `same` (captions that coincide) are all positives.

    Plain InfoNCE pushes a picture away from a caption equal to its own; small or templated data sets have many.
    """

    def __init__(self, a: str = "image", b: str = "text", same: str = "text") -> None:
        self.a, self.b, self.same = a, b, same

    def __call__(self, outputs: Outputs) -> Tensor:
        """Compute this rank's share, whose mean over ranks is the loss of the global batch."""
        a, b = embedding_pair(outputs, self.a, self.b)
        if self.same not in outputs.identities:
            raise InputError(
                f"loss compares ids of {self.same!r}, but only {sorted(outputs.identities)} are given as ids; "
                "set its `same` to a modality of token ids, or use ContrastiveLoss"
            )
        mine = outputs.identities[self.same]
        positives = mine[:, None] == gather(mine)[None, :]
        return multi_positive_contrastive_loss(a, b, gather(a), gather(b), outputs.logit_scale, positives)


def embedding_pair(outputs: Outputs, a: str, b: str) -> tuple[Tensor, Tensor]:
    """Pick two modalities' embeddings; raises `InputError` naming those there are."""
    missing = [m for m in (a, b) if m not in outputs.embeddings]
    if missing:
        raise InputError(
            f"loss needs embeddings of {missing}, the batch has {sorted(outputs.embeddings)}; "
            "change the loss's `a` and `b`, or add the modality to data.fields"
        )
    return outputs.embeddings[a], outputs.embeddings[b]
