"""Ranks equal one process on the joined batch, in loss and every gradient, for losses and whole models."""

from __future__ import annotations

import pytest
import torch

from mmpretrain import (
    ContrastiveLoss,
    MultimodalModel,
    MultiPositiveContrastiveLoss,
    Padded,
    PredictionLoss,
    SigmoidLoss,
)
from tests import models
from tests.ranks import run_ranks

TOTAL = 12
FAMILIES = {
    "clip": (models.clip, lambda: [ContrastiveLoss()]),
    "clip_multi_positive": (models.clip, lambda: [MultiPositiveContrastiveLoss()]),
    "siglip": (models.siglip, lambda: [SigmoidLoss(chunk_size=2)]),
    "coca": (models.coca, lambda: [ContrastiveLoss(), PredictionLoss()]),
}


def global_batch(family: str) -> dict[str, Padded]:
    """Captions much longer on the last rank, so that a mean per rank would differ; two captions coincide."""
    lengths = [3] * (TOTAL // 2) + [12] * (TOTAL // 2)
    batch = models.batch(TOTAL, lengths=lengths)
    batch["text"].values[TOTAL - 1] = batch["text"].values[TOTAL - 2]
    batch["text"].values[1] = batch["text"].values[0]
    # Bidirectional text pooled at the last position sees padding, so all of its batch is padded to one length.
    return {**batch, "text": Padded(batch["text"].values)} if family == "siglip" else batch


def share(batch: dict[str, Padded], rank: int, world_size: int, trim: bool) -> dict[str, Padded]:
    rows = slice(rank * TOTAL // world_size, (rank + 1) * TOTAL // world_size)
    part = {m: Padded(p.values[rows], None if p.mask is None else p.mask[rows]) for m, p in batch.items()}
    if trim:  # each rank pads to its own longest caption, as the loader does
        longest = int(part["text"].mask.sum(1).max())
        part["text"] = Padded(part["text"].values[:, :longest], part["text"].mask[:, :longest])
    return part


def loss_and_gradients(family: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of this rank's share and its gradients, both averaged over ranks as data-parallel training does."""
    from mmpretrain.distributed import rank, sum_over_ranks, world_size

    build, losses = FAMILIES[family]
    model: MultimodalModel = build().double()
    batch = share(global_batch(family), rank(), world_size(), trim=family != "siglip")
    outputs = model(
        {m: Padded(p.values.double() / 255 if m == "image" else p.values, p.mask) for m, p in batch.items()}
    )
    total = sum(loss(outputs) for loss in losses())
    total.backward()
    mean = sum_over_ranks(total.detach()) / world_size()
    gradients = {n: sum_over_ranks(p.grad) / world_size() for n, p in model.named_parameters() if p.grad is not None}
    return mean.item(), gradients


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_equal_one_process(family, world_size):
    if world_size == 3 and family != "siglip":
        pytest.skip("an odd ring matters to the ring loss alone")
    want_loss, want = loss_and_gradients(family)
    assert {"logit_scale"} <= set(want) and ("logit_bias" in want) == (family == "siglip")
    for got_loss, got in run_ranks(loss_and_gradients, world_size, family):
        assert got_loss == pytest.approx(want_loss, abs=1e-10)
        assert set(got) == set(want)
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-10, msg=name)


def test_the_comparison_can_fail():
    """Without the gradient that flows back through other ranks' rows, the gradients would differ."""
    results = run_ranks(local_only_gradients, 2)
    _, want = loss_and_gradients("clip")
    worst = max((results[0][n] - g).abs().max().item() for n, g in want.items())
    assert worst > 1e-4


def local_only_gradients() -> dict[str, torch.Tensor]:
    from mmpretrain import contrastive_loss
    from mmpretrain.distributed import gather, rank, sum_over_ranks, world_size

    model = models.clip().double()
    batch = share(global_batch("clip"), rank(), world_size(), trim=True)
    outputs = model({"image": Padded(batch["image"].values.double() / 255), "text": batch["text"]})
    a, b = outputs.embeddings["image"], outputs.embeddings["text"]
    loss = contrastive_loss(a, b, gather(a).detach(), gather(b).detach(), outputs.logit_scale, rank() * len(a))
    loss.backward()
    return {n: sum_over_ranks(p.grad) / world_size() for n, p in model.named_parameters() if p.grad is not None}
