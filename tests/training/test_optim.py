"""Parameter groups, Muon's routing and the shapes of the learning rate."""

from __future__ import annotations

import math

import pytest
import timm.optim
import torch

from mmpretrain import InputError
from mmpretrain.training.optim import constant_with_cooldown, muon_groups, parameter_groups, warmup_cosine
from tests import models


def names(model, parameters) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


@pytest.mark.parametrize("family", [models.clip, models.siglip, models.coca])
def test_gains_biases_and_the_temperature_are_not_decayed(family):
    model = family()
    decayed, plain = parameter_groups(model, 0.2)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    assert {id(p) for g in (decayed, plain) for p in g["params"]} == {id(p) for p in model.parameters()}
    free = names(model, plain["params"])
    assert "logit_scale" in free and {"encoders.image.backbone.pos_embed"} <= free
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or parameter.ndim < 2:
            assert name in free, name
    assert {n for n in names(model, decayed["params"]) if n.endswith("attention.q.weight")}


def test_frozen_parameters_are_in_no_group():
    model = models.clip()
    model.encoders["image"].requires_grad_(False)
    grouped = names(model, [p for g in parameter_groups(model, 0.1) for p in g["params"]])
    assert grouped and not any(name.startswith("encoders.image") for name in grouped)


def test_muon_takes_hidden_matrices_only():
    model = models.coca()
    hidden, rest, plain = muon_groups(model, 0.1)
    muon = names(model, hidden["params"])
    assert all(dict(model.named_parameters())[name].ndim == 2 for name in muon)
    for excluded in (
        "encoders.text.token_embedding.weight",
        "encoders.text.position_embedding",
        "heads.caption.weight",
        "encoders.image.backbone.patch_embed.proj.weight",
        "logit_scale",
        "encoders.image.pool.caption.query",
    ):
        assert excluded not in muon
    assert {
        "encoders.text.blocks.0.mlp.up.weight",
        "encoders.image.backbone.blocks.0.attn.qkv.weight",
    } <= muon
    assert rest["use_fallback"] and plain["use_fallback"] and "use_fallback" not in hidden


def test_muon_orthogonalises_exactly_the_hidden_matrices():
    """A hidden matrix's first update has near-equal singular values; an embedding's has not."""
    model = models.clip()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = timm.optim.Muon(muon_groups(model, 0.0), lr=0.01)
    sum(e[:, :4].sum() for e in model(models.batch(8)).embeddings.values()).backward()
    optimizer.step()

    def spread(name):
        values = torch.linalg.svdvals(dict(model.named_parameters())[name].detach() - before[name])
        return (values[0] / values[len(values) // 2]).item()

    assert spread("encoders.text.blocks.0.mlp.up.weight") < 3
    assert spread("encoders.text.token_embedding.weight") > 3


def rates(schedule, steps: int, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = schedule(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warmup_then_cosine():
    got = rates(warmup_cosine, 10, total_steps=10, warmup_steps=2, final_factor=0.1)
    want = [1.0, 2.0] + [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2) for i in range(8)]
    assert got == pytest.approx(want)


def test_constant_then_cooldown():
    got = rates(constant_with_cooldown, 10, total_steps=10, warmup_steps=2, cooldown_steps=4)
    assert got == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5])


@pytest.mark.parametrize(("schedule", "extra"), [(warmup_cosine, {}), (constant_with_cooldown, {"cooldown_steps": 5})])
def test_phases_that_do_not_fit_are_refused(schedule, extra):
    with pytest.raises(InputError, match="do not fit into 10 training steps"):
        rates(schedule, 1, total_steps=10, warmup_steps=11, **extra)
