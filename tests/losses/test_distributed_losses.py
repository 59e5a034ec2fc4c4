"""Ranks equal one process on the joined batch, in loss and every gradient, for losses and whole models."""

from __future__ import annotations

import pytest
import torch

from mmpretrain import (
    ContrastiveLoss,
    MultimodalModel,
    MultiPositiveContrastiveLoss,
    Outputs,
    Padded,
    PredictionLoss,
    SigmoidLoss,
    contrastive_loss,
    multi_positive_contrastive_loss,
    sigmoid_loss,
)
from tests import models
from tests.ranks import run_ranks

TOTAL = 12
EXCHANGES = [{}, {"tile_size": 2}, {"tile_size": 5}, {"tile_size": 2, "exchange": "ring"}, {"exchange": "ring"}]
CASES = {
    "clip": [[ContrastiveLoss(**how)] for how in EXCHANGES],
    "clip_multi_positive": [[MultiPositiveContrastiveLoss(**how)] for how in EXCHANGES],
    "siglip": [[SigmoidLoss(**how)] for how in ({}, {"tile_size": 2}, {"tile_size": 5, "exchange": "gather"})],
    "coca": [[ContrastiveLoss(), PredictionLoss()], [ContrastiveLoss(tile_size=2), PredictionLoss()]],
}
"""Family -> ways to compute its loss."""


def whole(family: str, outputs: Outputs) -> torch.Tensor:
    """The loss of one process by the plain functions, which hold every similarity."""
    a, b, s = outputs.embeddings["image"], outputs.embeddings["text"], outputs.logit_scale
    if family == "siglip":
        return sigmoid_loss(a, b, s, outputs.logit_bias)
    if family == "clip_multi_positive":
        same = outputs.identities["text"]
        return multi_positive_contrastive_loss(a, b, a, b, s, same[:, None] == same)
    return contrastive_loss(a, b, a, b, s) + (PredictionLoss()(outputs) if family == "coca" else 0)


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


Found = tuple[float, dict[str, torch.Tensor]]


def build(family: str) -> MultimodalModel:
    return (models.clip if family.startswith("clip") else getattr(models, family))().double()


def outputs_of(model: MultimodalModel, family: str) -> Outputs:
    from mmpretrain.distributed import rank, world_size

    batch = share(global_batch(family), rank(), world_size(), trim=family != "siglip")
    return model({m: Padded(p.values.double() / 255 if m == "image" else p.values, p.mask) for m, p in batch.items()})


def found(model: MultimodalModel, total: torch.Tensor) -> Found:
    """Loss of this rank's share and its gradients, both averaged over ranks as data-parallel training does."""
    from mmpretrain.distributed import sum_over_ranks, world_size

    model.zero_grad()
    total.backward()
    mean = sum_over_ranks(total.detach()) / world_size()
    gradients = {n: sum_over_ranks(p.grad) / world_size() for n, p in model.named_parameters() if p.grad is not None}
    return mean.item(), gradients


def every_way() -> dict[str, list[Found]]:
    results: dict[str, list[Found]] = {}
    for family, ways in CASES.items():
        model = build(family)
        for losses in ways:
            outputs = outputs_of(model, family)
            results.setdefault(family, []).append(found(model, sum(loss(outputs) for loss in losses)))
    return results


def reference(family: str) -> Found:
    model = build(family)
    return found(model, whole(family, outputs_of(model, family)))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_equal_one_process(world_size):
    wanted = {family: reference(family) for family in CASES}
    for result in run_ranks(every_way, world_size):
        for family, (want_loss, want) in wanted.items():
            assert {"logit_scale"} <= set(want) and ("logit_bias" in want) == (family == "siglip")
            for way, (got_loss, got) in enumerate(result[family]):
                assert got_loss == pytest.approx(want_loss, abs=1e-10), (family, way)
                assert set(got) == set(want)
                for name, gradient in want.items():
                    torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-10, msg=f"{family} {way} {name}")


def test_the_comparison_can_fail():
    """Without the gradient that flows back through other ranks' rows, the gradients would differ."""
    results = run_ranks(local_only_gradients, 2)
    _, want = reference("clip")
    worst = max((results[0][n] - g).abs().max().item() for n, g in want.items())
    assert worst > 1e-4


def local_only_gradients() -> dict[str, torch.Tensor]:
    from mmpretrain.distributed import gather, rank

    model = build("clip")
    outputs = outputs_of(model, "clip")
    a, b = outputs.embeddings["image"], outputs.embeddings["text"]
    loss = contrastive_loss(a, b, gather(a).detach(), gather(b).detach(), outputs.logit_scale, rank() * len(a))
    return found(model, loss)[1]
