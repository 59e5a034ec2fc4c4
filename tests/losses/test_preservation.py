"""Preservation: the formulas, one process against two ranks and micro-batches, and an original that never changes."""

from __future__ import annotations

import copy

import pytest
import torch

from mmpretrain import InputError, MultimodalModel, Outputs, PreservationLoss, SimilarityPreservationLoss
from mmpretrain.data.step import Step
from mmpretrain.distributed import rank, sum_over_ranks, world_size
from mmpretrain.losses import ContrastiveLoss, preservation_loss, similarity_preservation_loss
from mmpretrain.training.module import TrainingModule
from tests import models
from tests.ranks import run_ranks

LOSSES = {"embeddings": PreservationLoss(), "similarities": SimilarityPreservationLoss()}


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_the_distance_is_half_of_the_squared_one():
    a, b = unit(6, 4), unit(6, 4, seed=1)
    want = sum(((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)) / 12
    assert preservation_loss(a, b).item() == pytest.approx(want.item(), abs=1e-12)
    assert preservation_loss(a, a).item() == pytest.approx(0, abs=1e-12)


def test_the_distance_is_not_rounded_under_autocast():
    old = unit(8, 64).float()
    new = torch.nn.functional.normalize(old + 0.01 * unit(8, 64, seed=1).float(), dim=-1)
    want = preservation_loss(new.double(), old.double()).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = preservation_loss(new, old)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(want, rel=1e-2)
    assert preservation_loss(new.bfloat16(), old.bfloat16()).dtype == torch.float32


def test_the_divergence_is_the_one_of_the_loops():
    a, b, old_a, old_b = (unit(5, 4, seed=seed) for seed in range(4))
    scale, before = torch.tensor([3.0], dtype=torch.float64), torch.tensor([7.0], dtype=torch.float64)
    total = 0.0
    for i in range(5):
        now = torch.softmax(torch.stack([3 * a[i] @ b[j] for j in range(5)]), 0)
        then = torch.softmax(torch.stack([7 * old_a[i] @ old_b[j] for j in range(5)]), 0)
        total += sum((then[j] * (then[j].log() - now[j].log())).item() for j in range(5))
    got = similarity_preservation_loss(a, b, scale, old_a, old_b, before)
    assert got.item() == pytest.approx(total / 5, abs=1e-10)
    assert similarity_preservation_loss(a, b, scale, a, b, scale).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_without_an_original_it_says_what_to_give(loss):
    outputs = Outputs({"image": unit(2, 4), "text": unit(2, 4)}, torch.ones(1), None, {}, {})
    with pytest.raises(InputError, match="init=MODEL"):
        loss(outputs)
    with pytest.raises(InputError, match="init=MODEL"):
        module(models.clip(), loss).preserve(None)


def module(model: MultimodalModel, loss, micro: int | None = None) -> TrainingModule:
    return TrainingModule(
        model,
        {"contrastive": ContrastiveLoss(), "preservation": loss},
        lambda groups: torch.optim.SGD(groups, 0.1),
        lambda model, decay: [{"params": list(model.parameters())}],
        micro_batch_size=micro,
    )


def moved() -> tuple[MultimodalModel, MultimodalModel]:
    """A model that fine-tuning has changed, and its original."""
    model: MultimodalModel = models.clip().double()
    original = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, original


def gradients(name: str, micro: int | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    model, original = moved()
    own = module(model, LOSSES[name], micro)
    own.preserve(original)
    whole = models.batch(8, pad_to=12)
    share = slice(rank() * 8 // world_size(), (rank() + 1) * 8 // world_size())
    batch = {m: p.rows(share) for m, p in whole.items()}
    batch["image"] = batch["image"]._replace(values=batch["image"].values.double() / 255)
    loss = own.training_step(Step({"image_text": batch}, None), 0)
    loss.backward()
    assert not any(p.requires_grad for p in original.parameters())
    found = {n: sum_over_ranks(p.grad) / world_size() for n, p in model.named_parameters()}
    return (sum_over_ranks(loss.detach()) / world_size()).item(), found


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_and_ranks_change_no_gradient(name):
    want_loss, want = gradients(name)
    for loss, got in [gradients(name, 3), *run_ranks(gradients, 2, name)]:
        assert loss == pytest.approx(want_loss, abs=1e-9)
        for parameter, gradient in want.items():
            torch.testing.assert_close(got[parameter], gradient, rtol=0, atol=1e-9, msg=parameter)


def test_the_original_is_no_part_of_what_is_trained_saved_or_switched():
    model, original = moved()
    own = module(model, LOSSES["embeddings"])
    own.preserve(original)
    own.train()
    assert not original.training
    assert own.state_dict().keys() == module(models.clip(), LOSSES["embeddings"]).state_dict().keys()
    assert {id(p) for p in own.parameters()} == {id(p) for p in model.parameters()}


def test_an_original_is_kept_only_where_a_loss_asks_for_it():
    own = TrainingModule(models.clip(), {"contrastive": ContrastiveLoss()}, torch.optim.SGD, lambda m, d: [])
    own.preserve(models.clip())
    assert own._original == ()
