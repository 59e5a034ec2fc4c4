"""Activation checkpointing: less is kept, every gradient stays, and what is random is drawn the same again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from mmpretrain import ContrastiveLoss, ImageEncoder, InputError, MultimodalModel, Padded, TextEncoder
from mmpretrain.activation_checkpointing import checkpoint_activations, repeated_blocks
from mmpretrain.layers import Block
from mmpretrain.training.micro_batches import forward_in_micro_batches
from tests import models
from tests.training.test_module import FAMILIES, double


def step(model: MultimodalModel, losses: Any, batch: Any, micro: int | None = None) -> tuple[dict[str, Any], int]:
    """Gradients of one step, and the bytes kept for them."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(5)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(batch) if micro is None else forward_in_micro_batches(model, batch, micro)
    sum(loss(outputs) for loss in losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, kept


class Dropping(nn.Module):
    """A block that is random."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(width, width), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(torch.tanh(self.layer(x)))


def dropping() -> MultimodalModel:
    """CLIP with patch dropout, and with dropout inside of a picture's blocks."""
    model = models.clip()
    encoder = ImageEncoder("vit_tiny_patch16_224", {**models.VIT, "img_size": 32, "patch_drop_rate": 0.5})
    encoder.backbone.blocks.append(Dropping(32))
    model.encoders["image"] = encoder
    return model


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("family", [*FAMILIES, "dropping"])
def test_no_gradient_changes_and_less_is_kept(family, mode):
    build, losses = FAMILIES.get(family, (dropping, [ContrastiveLoss()]))
    model, batch = build().double().train(), double(models.batch(8, pad_to=12))
    if family == "dropping":
        batch["image"] = Padded(torch.rand(8, 3, 32, 32, dtype=torch.float64))
    names = list(model.state_dict())
    want, whole = step(model, losses, batch)
    checkpoint_activations(model, mode)
    got, kept = step(model, losses, batch)
    assert list(model.state_dict()) == names and set(got) == set(want)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-10, msg=name)
    assert kept < {"full": 0.35, "selective": 0.75}[mode] * whole, kept / whole


def test_inside_micro_batches():
    build, losses = FAMILIES["coca"]
    model, batch = build().double().train(), double(models.batch(8, pad_to=12))
    want, whole = step(model, losses, batch, 4)
    checkpoint_activations(model, "full")
    got, kept = step(model, losses, batch, 4)
    assert kept <= whole  # a micro-batch keeps nothing of its inside
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-10, msg=name)


def test_evaluation_and_copies_are_left_alone():
    model = models.clip().eval()
    want = model.embed("text", models.batch(4)["text"])
    checkpoint_activations(model, "full")
    checkpoint_activations(model, "full")  # twice is once
    assert torch.equal(model.embed("text", models.batch(4)["text"]), want)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other.embed("text", models.batch(4)["text"]), want)


def test_blocks_are_the_innermost_repeated_parts():
    image = ImageEncoder("convnext_atto", {"depths": (2, 1, 1, 1), "dims": (8, 8, 16, 16)})
    model = MultimodalModel(16, {"image": image, "text": TextEncoder(50, 12, 32, 3, 2, 49)})
    found = repeated_blocks(model)
    assert sum(isinstance(block, Block) for block in found) == 3 and len(found) == 8
    inside = [part for block in found for part in block.modules()]
    assert len(inside) == len(set(inside))


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match="'some'; choose one of full, selective"):
        checkpoint_activations(models.clip(), "some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no repeated blocks"):
        checkpoint_activations(nn.Sequential(nn.Linear(2, 2)), "full")


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "hiera_tiny_224"])
def test_blocks_in_a_list_are_blocks_too(name):
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=0)
    assert repeated_blocks(backbone) == [*backbone.blocks]
