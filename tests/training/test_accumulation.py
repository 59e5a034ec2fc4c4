"""`trainer.micro_batch_size` through Lightning, on one process, DDP and FSDP2: the gradients of the whole batch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from mmpretrain import (
    ContrastiveLoss,
    MultimodalModel,
    MultiPositiveContrastiveLoss,
    Padded,
    PredictionLoss,
    SigmoidLoss,
)
from mmpretrain.data.step import Step, Trace
from mmpretrain.distributed import rank, world_size
from mmpretrain.training import micro_batches
from mmpretrain.training.module import TrainingModule
from mmpretrain.training.optim import parameter_groups
from mmpretrain.training.saving import SafeCheckpointIO
from mmpretrain.training.sharded import ShardedStrategy
from mmpretrain.types import Batch, Loss
from tests import models
from tests.ranks import run_ranks

TOTAL = 10
"""Samples of a step: 5 for each of two ranks, which pieces of 2 do not divide."""


LIGHTNING = ("`isinstance.treespec, LeafSpec.`", "The 'train_dataloader' does not have many workers")
"""Warnings of Lightning's own."""


class Family(NamedTuple):
    model: Callable[[], MultimodalModel]
    losses: dict[str, Loss]


FAMILIES = {
    "contrastive": Family(models.clip, {"contrastive": ContrastiveLoss()}),
    "multi_positive": Family(models.clip, {"contrastive": MultiPositiveContrastiveLoss()}),
    "sigmoid": Family(models.siglip, {"sigmoid": SigmoidLoss()}),
    "coca": Family(models.coca, {"contrastive": ContrastiveLoss(), "caption": PredictionLoss()}),
}


class Keep(lightning.pytorch.Callback):
    """Keeps the gradients of a step, whole."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        found = {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None}
        self.gradients = {n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in found.items()}


def batch(drop: bool) -> Batch:
    """This rank's rows of ten samples, the last two with a caption of the first two; pictures in float64."""
    whole = models.batch(TOTAL, pad_to=12)
    ids, mask = whole["text"].values, whole["text"].mask
    ids[-2:], mask[-2:] = ids[:2], mask[:2]
    share = slice(rank() * TOTAL // world_size(), (rank() + 1) * TOTAL // world_size())
    pixels = whole["image"].values.double() / 255
    if drop:  # more patches, so that some can be left out
        pixels = torch.nn.functional.interpolate(pixels, size=32)
    return {"image": Padded(pixels[share]), "text": Padded(ids[share], mask[share])}


def dropping(build: Callable[[], MultimodalModel]) -> MultimodalModel:
    """The same model on pictures of 32 pixels, with patch dropout and dropout."""
    size = models.VIT.copy()
    models.VIT.update(img_size=32, patch_drop_rate=0.5, proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2)
    try:
        return build()
    finally:
        models.VIT.clear()
        models.VIT.update(size)


def gradients(family: str, strategy: str, micro: int | None, drop: bool = False) -> dict[str, Tensor]:
    """Train one step as `mmpretrain train` does, on as many ranks as there are, and return its gradients."""
    build, losses = FAMILIES[family]
    model = (dropping(build) if drop else build()).double()
    for number, parameter in enumerate(model.parameters()):  # biases are drawn as zeros, which would hide a mistake
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    module = TrainingModule(
        model, losses, lambda groups: torch.optim.SGD(groups, lr=0.0), parameter_groups, micro_batch_size=micro
    )
    if world_size() > 1:
        os.environ |= {name: str(rank()) for name in ("RANK", "LOCAL_RANK")}
        os.environ |= {name: str(world_size()) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    made = {"one": lambda: "auto", "ddp": lambda: DDPStrategy(gradient_as_bucket_view=True), "fsdp": ShardedStrategy}
    keep = Keep()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size(),
        strategy=made[strategy](),
        max_steps=1,
        callbacks=[keep],
        plugins=[SafeCheckpointIO()],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    step = Step({"image_text": batch(drop)}, Trace({}, {}))
    with warnings.catch_warnings():
        for message in LIGHTNING:
            warnings.filterwarnings("ignore", message)
        trainer.fit(module, DataLoader([step], batch_size=None))
    return keep.gradients


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and "logit_scale" in want
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def joined(family: str, strategy: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients in pieces of 2 with dropout, and the same without recomputing, which cannot draw twice."""
    got = gradients(family, strategy, 2, drop=True)
    recompute, micro_batches.checkpoint = micro_batches.checkpoint, lambda model, piece, **_: model(piece)
    try:
        return got, gradients(family, strategy, 2, drop=True)
    finally:
        micro_batches.checkpoint = recompute


@pytest.mark.parametrize("micro", [1, 4, 100])
def test_pieces_equal_the_whole_with_several_positives(micro):
    same(gradients("multi_positive", "one", micro), gradients("multi_positive", "one", None))


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_drawn_once(family):
    same(*joined(family, "one"))


def on_ranks(strategy: str) -> tuple[dict[str, dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return {family: gradients(family, strategy, 2) for family in FAMILIES}, joined("coca", strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_pieces_on_two_ranks_equal_the_whole_batch_on_one(strategy):
    """A gradient that were sent while a later piece still adds to it would differ; dropout is drawn once, too."""
    want = {family: gradients(family, "one", None) for family in FAMILIES}
    for got, dropped in run_ranks(on_ranks, 2, strategy):
        for family in FAMILIES:
            same(got[family], want[family])
        same(*dropped)
