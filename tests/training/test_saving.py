"""When checkpoints are saved, what a failed save costs, and how training goes on from one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback

from mmpretrain.errors import InputError, LimitReached
from mmpretrain.training.best import KeepBest
from mmpretrain.training.checkpoint import load, newest, save
from mmpretrain.training.folder import checkpoints, linked, step_of
from mmpretrain.training.saving import Checkpoints
from mmpretrain.training.snapshot import Snapshot
from tests.faults.checkpoints import fill, small_disk


class Linear(lightning.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(width, width)
        self.losses: dict[int, float] = {}

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = (self.layer(batch) - 1).square().mean()
        self.losses[self.global_step] = loss.item()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
                "interval": "step",
            },
        }


class Counter(Callback):
    """A callback with a state, that can run something after a step."""

    def __init__(self, then: dict[int, Any] | None = None) -> None:
        self.count, self.then = 0, then or {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.count += 1
        if trainer.global_step in self.then:
            self.then[trainer.global_step](trainer, module)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class Rows:
    """A loader that says where it is."""

    def __init__(self, width: int) -> None:
        self.rows, self.position = torch.rand(16, 4, width, generator=torch.Generator().manual_seed(1)), 0

    def __iter__(self) -> Any:
        for index in range(self.position, len(self.rows)):
            self.position = index + 1
            yield self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def fit(own: Checkpoints, steps: int = 6, ckpt: Path | None = None, width: int = 4, after: Any = ()) -> Linear:
    module = Linear(width)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[own, *after],
        plugins=[own.io],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Rows(width), ckpt_path=ckpt)
    return module


@pytest.fixture(autouse=True)
def _quiet():
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.`", FutureWarning)  # Lightning's own
        yield


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(asynchronous, tmp_path):
    whole = fit(Checkpoints(tmp_path / "a", 0, asynchronous=asynchronous))
    fit(Checkpoints(tmp_path / "b", 2, asynchronous=asynchronous), steps=4)
    assert [path.name for path in checkpoints(tmp_path / "b")] == ["step_00000004", "step_00000002"]
    counter = Counter()
    part = fit(
        Checkpoints(tmp_path / "b", 2, asynchronous=asynchronous), ckpt=newest(tmp_path / "b").path, after=[counter]
    )
    assert part.losses == {step: whole.losses[step] for step in (4, 5)}
    assert all(torch.equal(a, b) for a, b in zip(part.parameters(), whole.parameters(), strict=True))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_what_training_changes_during_a_save_does_not_reach_it(tmp_path):
    """The background thread is held up while training goes on."""
    own, seen, steps = Checkpoints(tmp_path, 2), {}, threading.Event()
    write = own.io.writer

    def held(*args: Any) -> object:
        assert steps.wait(20)
        return write(*args)

    def note(trainer: Any, module: Linear) -> None:
        seen.update({name: value.clone() for name, value in module.state_dict().items()})

    own.io.writer = held
    fit(own, steps=4, after=[Counter({2: note, 3: lambda *_: steps.set()})])
    got = load(tmp_path / "step_00000002")["state_dict"]
    assert all(torch.equal(got[name], value) for name, value in seen.items())


def test_copies_are_reused_and_hold_their_values():
    io = Snapshot()
    tensors = {"a": torch.rand(3, 4).t(), "b": torch.tensor(2.0)}
    first = io.take(tensors)
    assert all(torch.equal(first[name], tensors[name]) for name in tensors)
    tensors["a"].zero_()
    assert first["a"].abs().sum() > 0
    again = io.take({**tensors, "b": torch.rand(2)})
    assert again["a"] is first["a"] and torch.equal(again["a"], tensors["a"]) and again["b"].shape == (2,)


def test_the_last_step_is_saved_before_what_comes_after(tmp_path):
    own, there = Checkpoints(tmp_path, 0), []

    def look(trainer: Any, module: Any) -> None:
        own.wait()
        there.append(newest(tmp_path).path)

    fit(own, steps=3, after=[Counter({3: look})])
    assert there == [tmp_path / "step_00000003"]


def test_save_now_waits_and_saves_a_step_once(tmp_path):
    own, safe = Checkpoints(tmp_path, 0), []

    def now(trainer: Any, module: Any) -> None:
        safe.append(own.save_now(trainer))
        safe.append(newest(tmp_path).path.name)
        before = (tmp_path / "step_00000002").stat().st_ino
        safe.append(own.save_now(trainer) and (tmp_path / "step_00000002").stat().st_ino == before)

    fit(own, steps=3, after=[Counter({2: now})])
    assert safe == [True, "step_00000002", True]


def test_resuming_does_not_save_the_same_step_again_unless_elsewhere(tmp_path):
    fit(Checkpoints(tmp_path / "a", 0), steps=2)
    start = newest(tmp_path / "a").path
    own = Checkpoints(tmp_path / "a", 0)
    fit(own, steps=2, ckpt=start)
    assert own.last is None or own.last == 2
    assert [path.name for path in checkpoints(tmp_path / "a")] == ["step_00000002"]
    other = Checkpoints(tmp_path / "b", 0)
    fit(other, steps=3, ckpt=start, after=[Counter({3: lambda trainer, module: None})])
    assert newest(tmp_path / "b").path == tmp_path / "b" / "step_00000003"


def test_rolling_back_gives_weights_optimizer_and_callbacks_back_and_goes_on(tmp_path):
    own, notes = Checkpoints(tmp_path, 2), {}
    counter = Counter()

    def spoil(trainer: Any, module: Linear) -> None:
        with torch.no_grad():
            module.layer.weight.fill_(torch.nan)
            trainer.optimizers[0].state[module.layer.weight]["exp_avg"].fill_(torch.nan)
        notes["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        notes["step"] = own.restore(trainer)
        saved = load(tmp_path / "step_00000002")
        notes["weights"] = torch.equal(saved["state_dict"]["layer.weight"], module.layer.weight)
        moment = saved["optimizer_states"][0]["state"][0]["exp_avg"]
        notes["moments"] = torch.equal(moment, trainer.optimizers[0].state[module.layer.weight]["exp_avg"])
        notes["same lr"] = notes["lr"] == trainer.optimizers[0].param_groups[0]["lr"]
        notes["count"], notes["global"] = counter.count, trainer.global_step

    counter.then = {3: spoil}
    module = fit(own, steps=5, after=[counter])
    # The counter of step 2 had not counted it yet: it stands after the callback that saves.
    assert notes == {**notes, "step": 2, "weights": True, "moments": True, "same lr": True, "count": 1, "global": 3}
    assert torch.isfinite(module.layer.weight).all() and sorted(module.losses) == [0, 1, 2, 3, 4]


def test_there_may_be_nothing_to_roll_back_to(tmp_path):
    own, found = Checkpoints(tmp_path, 0), []
    fit(own, steps=2, after=[Counter({1: lambda trainer, module: found.append(own.restore(trainer))})])
    assert found == [None]


class Scores(Callback):
    """Stands for an evaluation: a value at some steps."""

    def __init__(self, values: dict[int, float]) -> None:
        self.values = values

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step in self.values:
            trainer.callback_metrics["score"] = torch.tensor(self.values[trainer.global_step])


@pytest.mark.parametrize(("mode", "best", "later"), [("max", 3, 0.8), ("min", 4, 0.3)])
def test_the_best_is_kept_and_remembered(mode, best, later, tmp_path):
    own = Checkpoints(tmp_path, 2)
    scores = {1: 0.5, 2: float("nan"), 3: 0.9, 4: 0.4, 6: 0.5}
    fit(own, steps=6, after=[Scores(scores), KeepBest(own, "score", mode)])
    assert step_of(linked(tmp_path, "best")) == best and (tmp_path / "best").is_dir()
    assert step_of(linked(tmp_path, "latest")) == 6
    own = Checkpoints(tmp_path, 2)
    keep = KeepBest(own, "score", mode)
    fit(own, steps=8, ckpt=newest(tmp_path).path, after=[Scores({7: 0.6, 8: later}), keep])
    assert step_of(linked(tmp_path, "best")) == (3 if mode == "max" else 8)


def test_a_full_disk_is_reported_and_training_goes_on(capfd):
    with small_disk(4 << 20) as disk:
        if disk is None:
            pytest.skip("this process may not mount a tmpfs")
        filler = disk / "filler"
        own = Checkpoints(disk / "checkpoints", 1, max_failures=4)
        events = {2: lambda *_: (own.wait(), fill(filler)), 5: lambda *_: (own.wait(), filler.unlink())}
        module = fit(own, steps=7, width=200, after=[Counter(events)])
        assert sorted(module.losses) == [*range(7)]
        lines = [line for line in capfd.readouterr().err.splitlines() if "was not saved" in line]
        assert [line.split(":")[0] for line in lines] == [
            f"checkpoint of step {step} was not saved" for step in (3, 4, 5)
        ]
        assert "free" in lines[0] and "failure 3 in a row" in lines[2] and "training goes on" in lines[2]
        assert newest(disk / "checkpoints").path == disk / "checkpoints" / "step_00000007"
        assert own.io.failures == 0


@pytest.mark.parametrize("asynchronous", [True, False])
def test_failures_are_bounded(asynchronous, tmp_path, capfd):
    (tmp_path / "file").write_text("a file, where a folder is wanted")
    own = Checkpoints(tmp_path / "file", 1, max_failures=2, asynchronous=asynchronous)
    with pytest.raises(LimitReached, match="2 checkpoints in a row"):
        fit(own, steps=6)
    assert capfd.readouterr().err.count("was not saved") == 2


def test_a_state_that_cannot_be_saved_is_an_error_of_its_own(tmp_path):
    counter = Counter()
    counter.count = object()
    with pytest.raises(InputError, match="Counter"):
        counter.on_train_batch_end = lambda *_: None
        fit(Checkpoints(tmp_path, 1), steps=2, after=[counter])


@pytest.mark.parametrize(("every", "keep", "failures"), [(-1, 2, 3), (1, 0, 3), (1, 2, 0)])
def test_wrong_settings(every, keep, failures, tmp_path):
    with pytest.raises(InputError, match="give at least"):
        Checkpoints(tmp_path, every, keep, max_failures=failures)


def test_a_damaged_checkpoint_is_refused_by_the_trainer(tmp_path):
    fit(Checkpoints(tmp_path, 0), steps=2)
    file = tmp_path / "step_00000002" / "state_dict-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match="state_dict-00001"):
        fit(Checkpoints(tmp_path, 0), steps=3, ckpt=tmp_path / "step_00000002")


def test_the_plain_functions_need_no_trainer(tmp_path):
    assert load(save(tmp_path, {"a": 1}, 3)) == {"a": 1}
