"""A bad step leaves nothing behind, costs budget, and enough of them go back to a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmpretrain import InputError, MultimodalModel, TextEncoder
from mmpretrain.errors import LimitReached
from mmpretrain.training.guard import CAUSE, NonFiniteGuard, skips_on_device
from mmpretrain.training.saving import Checkpoints
from mmpretrain.types import Encoded
from tests import models
from tests.faults.bad_steps import KINDS, OPTIMIZERS, ROWS, EventFile, NoCheckpoints, Poison, data, differing, fit

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=cuda)]


def without(steps, bad):
    return [step for number, step in enumerate(steps, start=1) if number not in bad]


@pytest.mark.parametrize("accelerator", DEVICES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_a_run_without_the_bad_steps(kind, optimizer, accelerator, tmp_path):
    steps, bad = data(6), {1, 3, 4}
    options = {"accelerator": accelerator, "check_every_n_steps": 4}
    got, _ = fit(steps, tmp_path, optimizer, [Poison(kind, bad)], **options)
    want, _ = fit(without(steps, bad), tmp_path / "other", optimizer, accelerator=accelerator)
    assert differing(got, want) == []
    assert got["updates"] == 3
    start = models.clip().double().state_dict()
    assert differing({k.removeprefix("model/"): v.cpu() for k, v in got.items() if k.startswith("model/")}, start)


class Normed(nn.Module):
    """A picture encoder with batch norm."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8)

    def forward(self, values, mask=None):
        pooled = self.norm(self.convolution(values)).mean((2, 3))
        return Encoded(pooled, pooled[:, None], torch.ones_like(pooled[:, :1], dtype=torch.bool))


def normed() -> MultimodalModel:
    torch.manual_seed(0)
    text = TextEncoder(models.VOCAB, 12, 32, 1, 2, models.EOS)
    return MultimodalModel(16, {"image": Normed(), "text": text})


def test_batch_norms_averages_know_nothing_of_a_bad_step(tmp_path):
    steps, bad = data(5), {2, 3}
    got, _ = fit(steps, tmp_path, callbacks=[Poison("pixel", bad)], model=normed())
    want, _ = fit(without(steps, bad), tmp_path / "other", model=normed())
    assert differing(got, want) == []
    assert got["model/encoders.image.norm.num_batches_tracked"] == 3


@pytest.mark.parametrize("every", [1, 3, 100])
def test_every_bad_step_is_written_down_once_with_its_samples(tmp_path, every):
    fit(data(7), tmp_path, callbacks=[Poison("loss", {2, 3, 7})], check_every_n_steps=every)
    events = EventFile(tmp_path / "data_events.jsonl").read()
    assert [event["step"] for event in events] == [2, 3, 7]
    assert {event["cause"] for event in events} == {CAUSE}
    assert events[1]["ids"] == [f"shard.tar:2-0-{row}" for row in range(ROWS)]


def test_beyond_the_budget_the_run_stops_and_names_the_samples(tmp_path):
    with pytest.raises(
        LimitReached, match=r"2 of 5 steps .* budget of 1; the last, step 5, had the samples shard.tar:4"
    ):
        fit(data(9), tmp_path, callbacks=[Poison("loss", {2, 5})], budget=1, check_every_n_steps=1)
    fit(data(9), tmp_path, callbacks=[Poison("loss", {2, 5})], budget=2, check_every_n_steps=1)


def test_enough_bad_steps_in_a_row_go_back_to_the_checkpoint(tmp_path, capsys):
    """Saved at step 3; step 4 is good but undone, as 5 and 6 are bad; 7 and 8 go on from step 3, optimizer included."""
    steps, kept = data(8), Checkpoints(tmp_path / "checkpoints", 3)
    bad = Poison("gradient", {5, 6})
    got, _ = fit(steps, tmp_path, "adamw", [bad], checkpoints=kept, rollback_after=2, check_every_n_steps=2)
    want, _ = fit([*steps[:3], *steps[6:]], tmp_path / "other")
    assert differing(got, want) == []
    said = capsys.readouterr().err
    assert "step 6: 2 steps in a row had a non-finite loss or gradient" in said and "of step 3 again (2 of 100" in said


def test_going_back_gives_no_budget_back(tmp_path):
    steps, kept = data(12), Checkpoints(tmp_path / "checkpoints", 2)
    bad = Poison("loss", set(range(3, 13)))
    with pytest.raises(LimitReached, match=r"5 of 7 steps"):
        fit(steps, tmp_path, "adamw", [bad], checkpoints=kept, budget=4, rollback_after=2, check_every_n_steps=1)


def test_going_back_without_a_checkpoint_stops_the_run(tmp_path):
    with pytest.raises(LimitReached, match=r"2 steps in a row .* no checkpoint to go back to"):
        fit(data(6), tmp_path, callbacks=[Poison("loss", {3, 4})], rollback_after=2, check_every_n_steps=2)


def test_two_separate_bad_steps_are_no_row(tmp_path):
    fit(data(6), tmp_path, callbacks=[Poison("loss", {1, 3, 5})], rollback_after=2, check_every_n_steps=1)


def test_the_counts_go_on_after_a_resume():
    first = NonFiniteGuard(EventFile, NoCheckpoints())
    first.load_state_dict({"total": 3, "in_a_row": 2})
    second = NonFiniteGuard(EventFile, NoCheckpoints())
    second.load_state_dict(first.state_dict())
    assert (second.total, second.in_a_row) == (3, 2)


@pytest.mark.parametrize("wrong", [{"rollback_after": 0}, {"budget": -1}, {"check_every_n_steps": 0}])
def test_wrong_limits_are_refused(wrong):
    with pytest.raises(InputError, match=r"callbacks\.bad_steps"):
        NonFiniteGuard(EventFile, NoCheckpoints(), **wrong)


def test_flags_are_read_where_a_checkpoint_is_saved():
    guard = NonFiniteGuard(EventFile, NoCheckpoints(), check_every_n_steps=10, saves=[0, 25])
    assert guard.intervals == [10, 25]


def test_only_fused_adam_skips_by_itself():
    weights = [nn.Parameter(torch.zeros(3))]
    assert skips_on_device(torch.optim.AdamW(weights, fused=True))
    assert skips_on_device(torch.optim.Adam(weights, fused=True))
    assert not skips_on_device(torch.optim.AdamW(weights))
    assert not skips_on_device(torch.optim.SGD(weights, lr=0.1, fused=True))


def test_the_fused_kernel_skips_exactly():
    """What a GPU relies on, on the CPU's kernel: the first step and a later one, by `found_inf`."""
    weight = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for found, gradient in ((1.0, torch.nan), (0.0, 1.0), (1.0, torch.inf)):
        before = [weight.detach().clone(), *(v.clone() for v in optimizer.state[weight].values())]
        weight.grad = torch.full_like(weight, gradient)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        after = [weight.detach(), *optimizer.state[weight].values()]
        assert all(map(torch.equal, before, after)) == bool(found)
        assert optimizer.state[weight]["step"] == (0 if gradient != gradient else 1)
