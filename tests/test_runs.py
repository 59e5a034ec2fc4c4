"""Which folder a run writes to, and which checkpoint it goes on from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from mmpretrain.errors import InputError
from mmpretrain.runs import Run, check_adapters, check_checkpoint, open_run
from mmpretrain.training.checkpoint import save


def config(run_dir: Path, resume: str | Path | None = None) -> Any:
    return OmegaConf.create({"run_dir": str(run_dir), "resume": None if resume is None else str(resume), "seed": 0})


@pytest.fixture
def named() -> Iterator[None]:
    """The command line names run_dir."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = OmegaConf.create({"hydra": {"mode": "RUN", "overrides": {"task": ["run_dir=x"]}}})
    yield
    HydraConfig.instance().cfg = before


def made(folder: Path, *steps: int, latest: bool = True) -> Path:
    """A run folder with checkpoints."""
    Run(folder, None).start(config(folder))
    Run(folder, None).end()
    for step in steps:
        save(folder / "checkpoints", {"state_dict": {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}}, step)
    return folder


def damage(folder: Path, step: int) -> Path:
    file = folder / "checkpoints" / f"step_{step:08d}" / "state_dict-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    return file


def test_a_new_run_and_a_taken_folder(tmp_path):
    run = open_run(config(tmp_path / "runs" / "a"))
    assert run == Run(tmp_path / "runs" / "a", None, 0) and not run.folder.exists()
    run.start(config(run.folder))
    assert (tmp_path / "runs" / "latest").resolve() == run.folder and run.checkpoints.is_dir()
    with pytest.raises(InputError, match="resume=auto"):
        open_run(config(run.folder))
    run.end()


def test_auto_starts_a_run_where_there_is_none_and_says_so(tmp_path, capsys):
    assert open_run(config(tmp_path / "runs" / "a", "auto")) == Run(tmp_path / "runs" / "a", None)
    assert "starting one" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_auto_takes_the_latest_run(tmp_path, capsys):
    made(tmp_path / "runs" / "a", 5)
    made(tmp_path / "runs" / "b", 1, 2)
    run = open_run(config(tmp_path / "runs" / "new", "auto"))
    folder = tmp_path / "runs" / "b"
    assert run == Run(folder, str(folder / "checkpoints" / "step_00000002"), 2)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("named")
def test_auto_takes_the_named_run(tmp_path, capsys):
    made(tmp_path / "runs" / "a", 5)
    made(tmp_path / "runs" / "b", 1)
    assert open_run(config(tmp_path / "runs" / "a", "auto")).step == 5
    assert open_run(config(tmp_path / "runs" / "c", "auto")) == Run(tmp_path / "runs" / "c", None)


@pytest.mark.usefixtures("named")
def test_a_run_killed_before_its_first_checkpoint_starts_again_in_its_folder(tmp_path, capsys):
    folder = made(tmp_path / "a")
    (folder / "checkpoints" / ".step_00000001.7").mkdir()
    assert open_run(config(folder, "auto")) == Run(folder, None)
    assert "no checkpoint yet" in capsys.readouterr().err


@pytest.mark.usefixtures("named")
def test_a_damaged_checkpoint_is_one_line_and_the_previous_is_taken(tmp_path, capsys):
    folder = made(tmp_path / "a", 1, 2)
    file = damage(folder, 2)
    assert open_run(config(folder, "auto")).step == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("refused: ") and str(file) in line
    damage(folder, 1)
    with pytest.raises(InputError, match=r"no checkpoint of .* is sound"):
        open_run(config(folder, "auto"))


def test_a_path_names_a_run_or_a_checkpoint(tmp_path):
    folder = made(tmp_path / "runs" / "a", 1, 2)
    checkpoints, other = folder / "checkpoints", tmp_path / "runs" / "b"
    assert open_run(config(other, folder)) == Run(folder, str(checkpoints / "step_00000002"), 2)
    assert open_run(config(other, checkpoints / "step_00000001")) == Run(folder, str(checkpoints / "step_00000001"), 1)
    assert open_run(config(other, checkpoints / "latest")).step == 2
    copy = (checkpoints / "step_00000001").rename(tmp_path / "copy")
    assert open_run(config(other, copy)) == Run(other, str(copy), 1)


@pytest.mark.usefixtures("named")
def test_a_named_folder_goes_on_from_another_run(tmp_path):
    folder = made(tmp_path / "runs" / "a", 1)
    other = tmp_path / "runs" / "b"
    assert open_run(config(other, folder)) == Run(other, str(folder / "checkpoints" / "step_00000001"), 1)


def test_wrong_paths_say_what_to_give(tmp_path):
    for path, words in (
        (tmp_path / "no", "no such path"),
        (tmp_path, "no run and no checkpoint"),
        (__file__, "no run"),
    ):
        with pytest.raises(InputError, match=words):
            open_run(config(tmp_path / "r", path))
    with pytest.raises(InputError, match="holds no checkpoint yet"):
        open_run(config(tmp_path / "r", made(tmp_path / "a")))
    folder = made(tmp_path / "b", 1, 2)
    file = damage(folder, 2)
    with pytest.raises(InputError, match=file.name):
        open_run(config(tmp_path / "r", folder / "checkpoints" / "step_00000002"))


def test_a_checkpoint_of_another_model_is_listed(tmp_path):
    path = str(made(tmp_path / "a", 3) / "checkpoints" / "step_00000003")
    check_checkpoint(Run(tmp_path / "a", path, 3), torch.nn.Linear(3, 2), 9)
    with pytest.raises(InputError, match=r"another shape 2 \(bias, weight\)"):
        check_checkpoint(Run(tmp_path / "a", path, 3), torch.nn.Linear(3, 4), 9)
    with pytest.raises(InputError, match=r"missing 2 \(0\.bias, 0\.weight\); extra 2 \(bias, weight\)"):
        check_checkpoint(Run(tmp_path / "a", path, 3), torch.nn.Sequential(torch.nn.Linear(3, 2)), 9)


def test_a_checkpoint_goes_on_with_the_adapters_it_was_made_with(tmp_path):
    folder = made(tmp_path / "a", 3)
    run = Run(folder, str(folder / "checkpoints" / "step_00000003"), 3)
    check_adapters(run, None)
    with pytest.raises(InputError, match="alpha=None, now 16"):
        check_adapters(run, {"rank": 2, "alpha": 16.0})
    OmegaConf.save({"finetune": {"lora": {"rank": 2, "alpha": 16.0}}}, folder / "config.yaml")
    check_adapters(run, {"rank": 2, "alpha": 16.0})
    check_adapters(Run(folder, None), {"rank": 9})
    with pytest.raises(InputError, match=r"another finetune.lora: alpha=16.0, now 8.0; give"):
        check_adapters(run, {"rank": 2, "alpha": 8.0})
    with pytest.raises(InputError, match="rank=2, now None"):
        check_adapters(run, None)


def test_at_the_last_step_only_a_finished_run_has_nothing_left(tmp_path):
    folder = made(tmp_path / "a", 3)
    run = Run(folder, str(folder / "checkpoints" / "step_00000003"), 3)
    check_checkpoint(run, torch.nn.Linear(3, 2), 3)
    with pytest.raises(InputError, match="nothing is left"):
        check_checkpoint(run, torch.nn.Linear(3, 2), 2)
    (folder / "metrics.json").write_text('{"train/steps": 3}')
    assert run.finished
    with pytest.raises(InputError, match=r"raise trainer\.max_steps"):
        check_checkpoint(run, torch.nn.Linear(3, 2), 3)


def test_two_processes_never_write_one_run(tmp_path):
    run = Run(tmp_path / "a", None)
    run.start(config(run.folder))
    run.end()
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True)"
    )
    command = [sys.executable, "-c", f"{code}; sys.stdin.read()", str(run.checkpoints / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="in use by another process"):
            run.start(config(run.folder))
        other.kill()  # the system lets go of it, whatever ends the process
    run.start(config(run.folder))
    run.end()
