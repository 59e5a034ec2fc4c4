"""Rates that fall with the layer: each parameter has the one of the formula, under AdamW and Muon, and keeps it."""

from __future__ import annotations

import lightning
import pytest
import timm.optim
import torch

from mmpretrain import ContrastiveLoss, HuggingFaceTextEncoder, ImageEncoder, InputError, MultimodalModel
from mmpretrain.training.layer_decay import layer_scales
from mmpretrain.training.lora import Lora
from mmpretrain.training.module import TrainingModule
from mmpretrain.training.optim import muon_groups, parameter_groups, warmup_cosine
from tests import models
from tests.training.test_lora import BERT

DECAY = 0.5


def expected(name: str) -> float:
    """What the docstring of layer_decay says, for the tiny CLIP of two blocks in each encoder."""
    image, text = "encoders.image.backbone.", "encoders.text."
    for start, first in ((image, ("cls_token", "pos_embed", "patch_embed")), (text, ("token_", "position_"))):
        if name.startswith(start):
            rest = name.removeprefix(start)
            if rest.startswith(first):
                return DECAY**3
            if rest.startswith("blocks."):
                return DECAY ** (2 - int(rest.split(".")[1]))
            return DECAY  # the norm after the last block
    return 1.0


def test_every_parameter_has_the_rate_of_the_formula():
    scales = layer_scales(models.clip(), DECAY)
    assert scales == {name: expected(name) for name, _ in models.clip().named_parameters()}
    assert {scales["logit_scale"], scales["projections.text.weight"]} == {1.0}


def test_timm_backbones_are_split_as_timm_splits_them():
    model = MultimodalModel(16, {"image": ImageEncoder("convnext_atto", {"depths": (1, 2, 1, 1), "dims": (8,) * 4})})
    backbone = model.encoders["image"].backbone
    theirs = timm.optim.param_groups_layer_decay(backbone, layer_decay=DECAY)
    names = {id(p): name for name, p in backbone.named_parameters()}
    want = {names[id(p)]: group["lr_scale"] for group in theirs for p in group["params"]}
    got = layer_scales(model, DECAY)
    top = max(want.values())
    for name, scale in want.items():  # timm counts from the last layer a backbone has, we from the projection behind it
        ratio = got[f"encoders.image.backbone.{name}"] / (scale / top)
        assert ratio in (DECAY, 1.0), name
    assert got["encoders.image.backbone.stem.0.weight"] == min(got.values()) < DECAY**5


def test_poolers_and_adapters_go_with_their_place():
    scales = layer_scales(models.coca(), DECAY)
    assert {s for name, s in scales.items() if ".image.pool." in name or name.startswith(("fusion", "heads"))} == {1.0}
    model = MultimodalModel(16, {"text": HuggingFaceTextEncoder(BERT, context_length=12)})
    Lora().attach(model)
    scales = layer_scales(model, DECAY)
    start = "encoders.text.transformer."
    assert scales[f"{start}embeddings.word_embeddings.weight"] == DECAY**3
    assert scales[f"{start}encoder.layer.0.attention.self.query.lora_A.default.weight"] == DECAY**2
    assert scales[f"{start}encoder.layer.1.output.dense.weight"] == DECAY


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizers_and_schedules_keep_each_rate(kind):
    model = models.clip()
    groups, build = {
        "adamw": (parameter_groups, lambda groups: torch.optim.AdamW(groups, lr=0.1)),
        "muon": (muon_groups, lambda groups: timm.optim.Muon(groups, lr=0.1)),
    }[kind]
    module = TrainingModule(
        model,
        {"contrastive": ContrastiveLoss()},
        build,
        lambda model, decay: groups(model, decay, layer_decay=DECAY),
        weight_decay=0.1,
        scheduler=lambda optimizer: warmup_cosine(optimizer, 10, 2),
    )
    built = module.configure_optimizers()
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
    names = {id(p): name for name, p in model.named_parameters()}
    plain = {id(p): {k: v for k, v in g.items() if k != "params"} for g in groups(model, 0.1) for p in g["params"]}
    for factor in (0.5, 1.0):
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates == pytest.approx({name: 0.1 * factor * expected(name) for name in names.values()})
        optimizer.step()
        schedule.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert {key: group[key] for key in plain[id(parameter)]} == plain[id(parameter)]
    assert optimizer.param_groups[0]["lr_scale"] == 1.0
    assert isinstance(module, lightning.LightningModule)


@pytest.mark.parametrize("decay", [0.0, 1.5, -1.0])
def test_decays_that_are_none_are_refused(decay):
    with pytest.raises(InputError, match="layer_decay"):
        parameter_groups(models.clip(), 0.1, decay)


def test_without_a_decay_nothing_changes():
    model = models.clip()
    assert [set(group) for group in parameter_groups(model, 0.1)] == [{"params", "weight_decay"}] * 2
