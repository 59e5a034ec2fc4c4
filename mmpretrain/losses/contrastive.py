"""Symmetric InfoNCE (CLIP), with one or several positives for each row; in tiles where the batch is large."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.distributed import gather, rank, world_size
from mmpretrain.errors import InputError
from mmpretrain.losses.tiled_contrastive import contrastive_sweep
from mmpretrain.losses.tiles import Exchange, check_rows, check_tiles, tile_size_for
from mmpretrain.types import Outputs

PLAIN_UP_TO = 128 * 128
"""Similarities of a rank up to which the plain function is the faster one."""


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
    target = positives.to(torch.promote_types(a.dtype, torch.float32))
    target = target / target.sum(1, keepdim=True)
    return _symmetric_cross_entropy(a, b, all_a, all_b, logit_scale, target)


def _symmetric_cross_entropy(
    a: Tensor, b: Tensor, all_a: Tensor, all_b: Tensor, logit_scale: Tensor, target: Tensor
) -> Tensor:
    # Half precision cannot resolve a similarity at scale 100, so autocast must not reach these products.
    with torch.autocast(a.device.type, enabled=False):
        logits_a = logit_scale * a @ all_b.T
        logits_b = logit_scale * b @ all_a.T
        return (F.cross_entropy(logits_a, target) + F.cross_entropy(logits_b, target)) / 2


def tiled_contrastive_loss(
    a: Tensor,
    all_b: Tensor,
    logit_scale: Tensor,
    offset: int = 0,
    tile_size: int | None = None,
    identities: Tensor | None = None,
) -> Tensor:
    """`contrastive_loss` of local rows a (B,E) against all_b (G,E) without the (B,G) similarities, gradients too.

    With `identities` (G,) of all rows it is `multi_positive_contrastive_loss`: rows of equal identity are positives of
    each other. Memory is two tiles of (tile_size,tile_size); None takes a size that suits the device. With several
    ranks all call it together, with all columns in rank order, and the weight that multiplies the returned loss must be
    the same on every rank, since one rank's gradient counts the columns of the others. First derivatives only.
    """
    return _swept(a, all_b, logit_scale, identities, offset, tile_size, ring=False)


def ring_contrastive_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor, tile_size: int | None = None, identities: Tensor | None = None
) -> Tensor:
    """`tiled_contrastive_loss` of local rows a and b (B,E) without ever holding G columns.

    Blocks of b travel around the ranks with the log-sum-exps of their columns, and in the backward pass with their
    gradients. Every rank must pass the same B. `identities` (G,) are those of all ranks.
    """
    return _swept(a, b, logit_scale, identities, rank() * len(a), tile_size, ring=True)


def _swept(
    a: Tensor, b: Tensor, scale: Tensor, identities: Tensor | None, offset: int, tile_size: int | None, ring: bool
) -> Tensor:
    check_rows(a, b, identities, ring)
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(a.dtype, torch.float32)
        size = tile_size_for(a.device, tile_size)
        inputs = a.to(dtype), b.to(dtype), scale.to(dtype)
        loss: Tensor = contrastive_sweep(*inputs, identities, offset, size, ring)[0]
        return loss


class ContrastiveLoss:
    """Symmetric InfoNCE between two modalities over the global batch.

    `a`, `b`: modality names. `tile_size`: rows and columns of similarities held at once; None holds all of a small
    batch and tiles of a large one. `exchange`: "gather" holds the embeddings of all ranks for one modality, "ring"
    passes them around. Raises `InputError` where the model's outputs lack a modality or are no pairs.
    """

    def __init__(
        self, a: str = "image", b: str = "text", tile_size: int | None = None, exchange: Exchange = "gather"
    ) -> None:
        check_tiles(tile_size, exchange)
        self.a, self.b, self.tile_size, self.exchange = a, b, tile_size, exchange

    def __call__(self, outputs: Outputs) -> Tensor:
        """Compute this rank's share, whose mean over ranks is the loss of the global batch."""
        a, b = embedding_pair(outputs, self.a, self.b)
        scale, offset = outputs.logit_scale, rank() * len(a)
        if self.exchange == "ring":
            return ring_contrastive_loss(a, b, scale, self.tile_size)
        if _is_small(a, self.tile_size):
            return contrastive_loss(a, b, gather(a), gather(b), scale, offset)
        return tiled_contrastive_loss(a, gather(b), scale, offset, self.tile_size)


class MultiPositiveContrastiveLoss:
    """InfoNCE in which samples that carry the same ids in modality `same` (captions that coincide) are all positives.

    Plain InfoNCE pushes a picture away from a caption equal to its own; small or templated data sets have many.
    `tile_size`, `exchange`: as in `ContrastiveLoss`.
    """

    def __init__(
        self,
        a: str = "image",
        b: str = "text",
        same: str = "text",
        tile_size: int | None = None,
        exchange: Exchange = "gather",
    ) -> None:
        check_tiles(tile_size, exchange)
        self.a, self.b, self.same, self.tile_size, self.exchange = a, b, same, tile_size, exchange

    def __call__(self, outputs: Outputs) -> Tensor:
        """Compute this rank's share, whose mean over ranks is the loss of the global batch."""
        a, b = embedding_pair(outputs, self.a, self.b)
        if self.same not in outputs.identities:
            raise InputError(
                f"loss compares ids of {self.same!r}, but only {sorted(outputs.identities)} are given as ids; "
                "set its `same` to a modality of token ids, or use ContrastiveLoss"
            )
        mine, scale, offset = outputs.identities[self.same], outputs.logit_scale, rank() * len(a)
        everyone = gather(mine)  # eight bytes a row: those of all ranks fit even where their embeddings do not
        if self.exchange == "ring":
            return ring_contrastive_loss(a, b, scale, self.tile_size, everyone)
        if _is_small(a, self.tile_size):
            positives = mine[:, None] == everyone[None, :]
            return multi_positive_contrastive_loss(a, b, gather(a), gather(b), scale, positives)
        return tiled_contrastive_loss(a, gather(b), scale, offset, self.tile_size, everyone)


def _is_small(a: Tensor, tile_size: int | None) -> bool:
    return tile_size is None and len(a) ** 2 * world_size() <= PLAIN_UP_TO


def embedding_pair(outputs: Outputs, a: str, b: str) -> tuple[Tensor, Tensor]:
    """Pick two modalities' embeddings (B,E); raises `InputError` where one is not there or they are no pairs."""
    missing = [m for m in (a, b) if m not in outputs.embeddings]
    if missing:
        raise InputError(
            f"loss needs embeddings of {missing}, the batch has {sorted(outputs.embeddings)}; "
            "change the loss's `a` and `b`, or add the modality to data.fields"
        )
    first, second = outputs.embeddings[a], outputs.embeddings[b]
    if len(first) != len(second):
        raise InputError(
            f"loss needs pairs, the batch has {len(first)} rows of {a!r} and {len(second)} of {b!r}; "
            "give the loss two modalities of the same samples"
        )
    return first, second
