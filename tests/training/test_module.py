"""The training step: micro-batches equal the whole batch, weights of losses, what Lightning must not do."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import lightning
import pytest
import torch

import mmpretrain
from mmpretrain import (
    ContrastiveLoss,
    ImageEncoder,
    InputError,
    MultimodalModel,
    Padded,
    PredictionLoss,
    SigmoidLoss,
)
from mmpretrain.data.step import Step, Trace
from mmpretrain.training.micro_batches import forward_in_micro_batches
from mmpretrain.training.module import TrainingModule
from mmpretrain.training.optim import parameter_groups
from tests import models

FAMILIES = {
    "clip": (models.clip, [ContrastiveLoss()]),
    "siglip": (models.siglip, [SigmoidLoss()]),
    "coca": (models.coca, [ContrastiveLoss(), PredictionLoss()]),
}


def gradients(model, losses, batch, micro: int | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)  # patch dropout draws from it
    model.zero_grad()
    outputs = model(batch) if micro is None else forward_in_micro_batches(model, batch, micro)
    sum(loss(outputs) for loss in losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def double(batch):
    return {"image": Padded(batch["image"].values.double() / 255), "text": batch["text"]}


@pytest.mark.parametrize("micro", [1, 3, 5, 8, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_equal_the_whole_in_every_gradient(family, micro):
    build, losses = FAMILIES[family]
    model, batch = build().double().train(), double(models.batch(8, pad_to=12))
    want, got = gradients(model, losses, batch, None), gradients(model, losses, batch, micro)
    assert set(got) == set(want) and "logit_scale" in want
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("freeze", [["image"], []])
def test_batch_norm_sees_no_micro_batches_unless_it_is_frozen(freeze):
    image = ImageEncoder("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "stem_width": 8})
    model = MultimodalModel(16, {"image": image, "text": models.clip().encoders["text"]}, freeze=freeze)
    with nullcontext() if freeze else pytest.raises(InputError, match="batch norm"):
        TrainingModule(model, {"c": ContrastiveLoss()}, torch.optim.SGD, parameter_groups, micro_batch_size=2)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_logit_scale_stays_as_it_came(frozen, monkeypatch):
    monkeypatch.setattr(lightning.LightningModule, "optimizer_step", lambda *_: None)
    model = MultimodalModel(16, dict(models.clip().encoders), logit_scale=117.0)
    model.logit_scale.requires_grad_(not frozen)
    TrainingModule(model, {"c": ContrastiveLoss()}, torch.optim.SGD, parameter_groups).optimizer_step()
    assert model.logit_scale.exp().item() == pytest.approx(117 if frozen else 100)


def test_micro_batches_replay_the_random_state():
    """With patch dropout, the recomputed forward pass must drop the same patches, or gradients would not belong."""
    torch.manual_seed(0)
    image = ImageEncoder("vit_tiny_patch16_224", {**models.VIT, "img_size": 32, "patch_drop_rate": 0.5})
    model = MultimodalModel(16, {"image": image, "text": models.clip().encoders["text"]}).double().train()
    batch = {"image": Padded(torch.rand(6, 3, 32, 32, dtype=torch.float64)), "text": models.batch(6)["text"]}
    got = gradients(model, [ContrastiveLoss()], batch, 2)
    torch.manual_seed(5)
    parts = [
        model({m: Padded(*(t if t is None else t[i : i + 2] for t in p)) for m, p in batch.items()}) for i in (0, 2, 4)
    ]
    model.zero_grad()
    joined = parts[0]._replace(embeddings={m: torch.cat([p.embeddings[m] for p in parts]) for m in batch})
    ContrastiveLoss()(joined).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=1e-10, msg=name)


def test_micro_batches_hold_fewer_activations():
    model, batch = models.clip(), models.batch(32)

    def saved(run) -> int:
        held = 0

        def pack(tensor):
            nonlocal held
            held += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return held

    whole = saved(lambda: model(batch))
    pieces = saved(lambda: forward_in_micro_batches(model, batch, 4))
    assert pieces < whole / 3


def module(**options) -> TrainingModule:
    sgd = lambda groups: torch.optim.SGD(groups, lr=0.1)  # noqa: E731
    losses = {"contrastive": ContrastiveLoss(), "caption": PredictionLoss()}
    return TrainingModule(models.coca(), losses, sgd, parameter_groups, **options)


def test_losses_are_weighted_and_summed():
    torch.manual_seed(0)
    step = module(weights={"contrastive": 1.0, "caption": 2.0})
    total = step.training_step(Step({"image_text": models.batch(4)}, Trace({}, {})), 0)
    history = step.history
    assert total.item() == pytest.approx((history["loss/contrastive"] + 2 * history["loss/caption"]).item())
    assert history["loss/total"].item() == pytest.approx(total.item())


def test_sources_are_summed_and_a_loss_of_weight_zero_is_not_computed():
    step = module(weights={"caption": 0.0})
    one = step.training_step(Step({"a": models.batch(4)}, Trace({}, {})), 0)
    both = step.training_step(Step({"a": models.batch(4), "b": models.batch(4)}, Trace({}, {})), 0)
    assert both.item() == pytest.approx(2 * one.item())
    assert "loss/caption" not in step.history


def test_wrong_settings_are_refused():
    with pytest.raises(InputError, match="weights name"):
        module(weights={"captions": 2.0})
    with pytest.raises(InputError, match="micro_batch_size is 0"):
        module(micro_batch_size=0)
    with pytest.raises(InputError, match="selective would keep"):
        module(micro_batch_size=4, activation_checkpointing="selective")
    with pytest.raises(InputError, match=r"trainer\.compile is 'on'"):
        module(compile="on")


def test_the_step_count_is_never_asked_of_lightning():
    """Reading it in configure_optimizers makes Lightning 2.6 drop the state of the data loader."""
    package = Path(mmpretrain.__file__).parent
    assert not [p for p in package.rglob("*.py") if "estimated_stepping_batches" in p.read_text()]


def test_a_loss_is_one_number_of_any_shape():
    def trained(shape) -> TrainingModule:
        loss = lambda outputs: outputs.logit_scale.expand(shape)  # noqa: E731
        sgd = lambda groups: torch.optim.SGD(groups, lr=0.1)  # noqa: E731
        return TrainingModule(models.coca(), {"scale": loss}, sgd, parameter_groups)

    assert trained((1,)).training_step(Step({"a": models.batch(4)}, Trace({}, {})), 0).shape == ()
    with pytest.raises(InputError, match="'scale' gives a tensor"):
        trained((2,)).training_step(Step({"a": models.batch(4)}, Trace({}, {})), 0)
