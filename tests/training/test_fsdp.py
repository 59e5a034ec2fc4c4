"""FSDP2 on two gloo ranks: the same loss and weights as one process."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mmpretrain import ContrastiveLoss, MultimodalModel, Padded, PredictionLoss
from mmpretrain.distributed import rank, sum_over_ranks, world_size
from mmpretrain.training.fsdp import shard
from mmpretrain.training.optim import parameter_groups
from tests import models
from tests.ranks import run_ranks

TOTAL, STEPS = 8, 3


def steps(sharded: bool) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
    model: MultimodalModel = models.coca().double()
    if sharded:
        shard(model, init_device_mesh("cpu", (world_size(),)))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    rows = slice(rank() * TOTAL // world_size(), (rank() + 1) * TOTAL // world_size())
    losses = []
    for step in range(STEPS):
        whole = models.batch(TOTAL, seed=step, pad_to=12)
        text = Padded(whole["text"].values[rows], whole["text"].mask[rows])
        outputs = model({"image": Padded(whole["image"].values[rows].double() / 255), "text": text})
        loss = ContrastiveLoss()(outputs) + 2 * PredictionLoss()(outputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((sum_over_ranks(loss) / world_size()).item())
    embedding = model.embed("text", models.batch(3)["text"]).detach()
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return losses, {name: tensor.detach().clone() for name, tensor in full.items()}, embedding


def test_two_sharded_ranks_equal_one_process():
    want_losses, want, want_embedding = steps(False)
    for losses, got, embedding in run_ranks(steps, 2, True):
        torch.testing.assert_close(losses, want_losses, rtol=0, atol=1e-10)
        torch.testing.assert_close(embedding, want_embedding, rtol=0, atol=1e-10)
        for name, parameter in want.items():
            # AdamW divides by the root of tiny second moments: rounding grows there, and there alone.
            torch.testing.assert_close(got[name], parameter, rtol=0, atol=1e-7, msg=name)
