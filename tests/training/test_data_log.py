"""The log of data: every step's ids, every loss once, the same after a kill and for any ranks, and the limit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch

from mmpretrain.data.datamodule import DataModule, Source, Step
from mmpretrain.distributed import rank, world_size
from mmpretrain.errors import LimitReached
from mmpretrain.training.data_log import DataLog, too_many
from tests.data.pictures import data_module, fields, tokenizer, write_shards
from tests.ranks import run_ranks

BAD = {"undecodable": ["0003", "0019", "0025"], "silent": ["0004"], "bare": ["0030"]}


class Model(lightning.LightningModule):
    """One number; stops with an error, as a kill would, before a step."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(1))
        self.fails_at = fails_at

    def training_step(self, step: Step, index: int) -> torch.Tensor:
        if self.global_step == self.fails_at:
            raise KeyboardError
        return self.number.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class KeyboardError(Exception):
    pass


class Save(lightning.Callback):
    def __init__(self, path: Path, at: int) -> None:
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


def fit(
    data: DataModule,
    log: DataLog,
    *others: Any,
    steps: int = 12,
    fails_at: int | None = None,
    resume: Path | None = None,
) -> None:
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=[log, *others],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.`", FutureWarning)  # Lightning's own
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
        trainer.fit(Model(fails_at), data, ckpt_path=resume, weights_only=True)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), **BAD)


def test_a_line_for_each_step_and_one_for_each_loss(folder: Path, tmp_path: Path) -> None:
    log = DataLog(tmp_path, sample_log=True)
    data = data_module(folder, max_bad_fraction=0.2)
    fit(data, log)
    samples = lines(tmp_path / "samples.jsonl")
    assert [line["step"] for line in samples] == list(range(1, 13))
    want = [step.trace.ids["pictures"] for step in data.loader(0, 1, 0, 12)]
    assert [line["ids"] for line in samples] == want
    events = lines(tmp_path / "data_events.jsonl")  # 12 steps are more than two epochs; a sample is lost once
    assert sorted((line["cause"], line["key"]) for line in events) == [
        ("missing", "0004"),
        ("missing", "0030"),
        ("undecodable", "0003"),
        ("undecodable", "0019"),
        ("undecodable", "0025"),
    ]
    assert set(events[0]) == {"step", "source", "shard", "offset", "key", "cause", "detail"}
    assert {line["source"] for line in events} == {"pictures"} and 1 <= events[0]["step"] <= 5
    totals = log.totals()
    assert (totals["data/lost/missing"], totals["data/lost/undecodable"], totals["data/lost/total"]) == (2, 3, 5)
    assert log.rows == 96 and totals["data/bad_fraction"] == log.bad.total() / 96
    idle = DataLog(tmp_path)  # resumed at the last step: no training starts
    idle.load_state_dict(log.state_dict())
    assert idle.totals() == totals


@pytest.mark.parametrize("sample_log", [False, True])
@pytest.mark.parametrize("every", [1, 4, 100])
def test_a_killed_and_resumed_run_leaves_the_files_of_one_that_never_was(
    folder: Path, tmp_path: Path, sample_log: bool, every: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    logs = []
    for path in (whole, parts):
        path.mkdir()
        logs.append(DataLog(path, sample_log, every, saves=(5,)))
    fit(data_module(folder, max_bad_fraction=0.2), logs[0])
    saved = tmp_path / "saved.ckpt"
    with pytest.raises(KeyboardError):
        fit(data_module(folder, max_bad_fraction=0.2), logs[1], Save(saved, 5), fails_at=9)
    with (parts / "data_events.jsonl").open("a") as file:
        file.write('{"step": 9, "sou')  # torn in the middle
    again = DataLog(parts, sample_log, every, saves=(5,))
    fit(data_module(folder, max_bad_fraction=0.2, num_workers=1), again, resume=saved)
    names = ["data_events.jsonl", "samples.jsonl"][: 1 + sample_log]
    assert sorted(path.name for path in parts.iterdir()) == names
    for name in names:
        assert (parts / name).read_text() == (whole / name).read_text()
    assert again.totals() == logs[0].totals() and again.rows == logs[0].rows == 96


def test_a_folder_that_was_used_before_begins_anew(folder: Path, tmp_path: Path) -> None:
    data = data_module(folder, max_bad_fraction=0.2)
    for _ in range(2):
        fit(data, DataLog(tmp_path, sample_log=True), steps=3)
    assert [line["step"] for line in lines(tmp_path / "samples.jsonl")] == [1, 2, 3]
    assert max(line["step"] for line in lines(tmp_path / "data_events.jsonl")) <= 3


def test_losses_known_from_the_index_stand_at_step_0_once(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", size=30)
    data_module(shards).setup()
    whole = (shards / "2.tar").read_bytes()
    (shards / "2.tar").write_bytes(whole[: len(whole) - 12_000])
    (tmp_path / "run").mkdir()
    for steps in (2, 3):
        log = DataLog(tmp_path / "run")
        fit(data_module(shards, max_bad_fraction=0.2), log, steps=steps)
        events = lines(tmp_path / "run" / "data_events.jsonl")
        assert {line["step"] for line in events} == {0}
        assert {Path(line["shard"]).name for line in events} == {"2.tar"}
        assert len({line["key"] for line in events}) == len(events) == log.totals()["data/lost/total"] > 1


def test_other_events_are_kept_in_their_place(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.ckpt"

    class Note(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            if trainer.global_step in (2, 4):
                log.note(trainer.global_step, {"cause": "non-finite loss", "ids": ["a"]})

    log = DataLog(tmp_path)
    fit(data_module(folder, max_bad_fraction=1), log, Note(), Save(saved, 3), steps=4)
    log = DataLog(tmp_path)
    fit(data_module(folder, max_bad_fraction=1), log, Note(), steps=5, resume=saved)
    noted = [line for line in lines(tmp_path / "data_events.jsonl") if "ids" in line]
    assert noted == [{"step": step, "cause": "non-finite loss", "ids": ["a"]} for step in (2, 4)]
    assert "data/lost/non-finite loss" not in log.totals()


def test_too_many_losses_stop_the_run_saying_why(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", undecodable=[f"{n:04}" for n in range(40) if n % 3 == 0])
    log = DataLog(tmp_path, every_n_steps=4)
    with pytest.raises(LimitReached, match=r"stopped at step 4: 1?\d of the 32 samples .*\(undecodable 1?\d\).*=0\.01"):
        fit(data_module(shards), log)
    assert lines(tmp_path / "data_events.jsonl")


def test_a_short_run_is_checked_at_its_end(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", undecodable=[f"{n:04}" for n in range(40) if n % 2 == 0])
    with pytest.raises(LimitReached, match="stopped at step 2: "):
        fit(data_module(shards), DataLog(tmp_path, every_n_steps=100), steps=2)


def test_chance_is_allowed_for() -> None:
    assert not too_many(0, 100, 0.0) and too_many(1, 100_000, 0.0)
    assert not too_many(1, 8, 0.01) and too_many(2, 8, 0.01)
    generator = torch.Generator().manual_seed(0)
    bad = (torch.rand(300, 2000, generator=generator) < 0.01).cumsum(1)
    false_alarms = sum(
        any(too_many(int(row[n]), n + 1, 0.01) for n in range(63, 2000, 64)) for row in bad
    )  # 300 runs with exactly the share that is allowed
    assert false_alarms <= 3
    assert too_many(160, 10_000, 0.01) and too_many(1_050_000, 10**8, 0.01)


def test_a_rollback_inside_a_run_does_not_set_the_counts_back(folder: Path, tmp_path: Path) -> None:
    log = DataLog(tmp_path)
    before = log.state_dict()
    fit(data_module(folder, max_bad_fraction=1), log, steps=3)
    log.load_state_dict(before)
    assert log.rows == 24


def follow(folder: Path, out: Path, stop: int, max_bad_fraction: float) -> dict[str, Any]:
    """Train without a trainer, so that ranks start fast: the callback's hooks around the real loader."""
    sources = {name: Source(str(folder), fields(), window=window) for name, window in (("b", 2), ("a", 16))}
    data = DataModule(sources, {"text": tokenizer()}, 8, seed=3, max_bad_fraction=max_bad_fraction)
    log = DataLog(out, sample_log=True)
    trainer: Any = SimpleNamespace(global_step=0, max_steps=100, is_global_zero=rank() == 0, datamodule=data)
    module: Any = None
    loader = data.loader(rank(), world_size(), 0, stop)  # opens the shards
    log.on_train_start(trainer, module)
    for index, step in enumerate(loader):
        trainer.global_step += 1
        log.on_train_batch_end(trainer, module, None, step, index)
    return log.state_dict()


def follow_twice(folder: Path, out: Path) -> tuple[dict[str, Any], str]:
    """Return the counts of a run to its end, and why another one stopped."""
    (out / "stopped").mkdir(exist_ok=True)
    state = follow(folder, out, 12, 0.5)
    with pytest.raises(LimitReached) as stopped:
        follow(folder, out / "stopped", 12, 0.0)
    return state, str(stopped.value)


@pytest.mark.slow
def test_files_and_the_stop_are_the_same_for_any_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    found = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        out.mkdir()
        results = run_ranks(follow_twice, count, folder, out) if count > 1 else [follow_twice(folder, out)]
        assert all(result == results[0] for result in results)
        state, why = results[0]
        files = [(out / name).read_text() for name in ("samples.jsonl", "data_events.jsonl", "stopped/samples.jsonl")]
        found[count] = (state, why.replace(str(out), ""), files)
    assert found[1] == found[2]
    assert [len(line["ids"]) for line in lines(tmp_path / "2" / "samples.jsonl")] == [16] * 12


def test_a_disk_that_is_full_for_a_while_costs_no_line(folder: Path, tmp_path: Path, capsys) -> None:
    """`/dev/full` refuses every byte, as a full disk does."""
    log, want = DataLog(tmp_path / "a", sample_log=True), DataLog(tmp_path / "b", sample_log=True)
    for name in "ab":
        (tmp_path / name).mkdir()

    class Full(lightning.Callback):
        def on_train_batch_end(self, trainer, *rest: Any) -> None:
            path = tmp_path / "a" / "samples.jsonl"
            if trainer.global_step == 3:
                path.rename(tmp_path / "aside")
                path.symlink_to("/dev/full")
            if trainer.global_step == 7:
                path.unlink()
                (tmp_path / "aside").rename(path)

    fit(data_module(folder, max_bad_fraction=0.2), log, Full())
    fit(data_module(folder, max_bad_fraction=0.2), want)
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == (tmp_path / "b" / "samples.jsonl").read_bytes()
    assert capsys.readouterr().err.count("cannot be written") == 1
