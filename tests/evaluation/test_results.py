"""What a kept score is of: the files of its data, and the weights and config of its model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mmpretrain.evaluation.candidates import find
from mmpretrain.evaluation.results import state_of, work
from tests.evaluation.suite_example import save_run


@pytest.mark.parametrize("named", ["pets", "~/pets", "pets/{0..1}.tar", "pets/*.tar", "pets/0.tar", "file://HERE/pets"])
def test_other_data_under_the_same_name_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pets").mkdir()
    for number in range(2):
        (tmp_path / "pets" / f"{number}.tar").write_bytes(b"1")
    config = {"data": [{"root": named.replace("HERE", str(tmp_path))}], "templates": ["a photo of {}.", "", "x" * 5000]}
    before = work("", "zero_shot", config, "cpu").key
    assert work("", "zero_shot", config, "cpu").key == before
    (tmp_path / "pets" / "0.tar").write_bytes(b"22")
    assert work("", "zero_shot", config, "cpu").key != before


def test_another_scale_of_the_adapters_is_another_model(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", (10,))
    step, config = str(run / "checkpoints" / "step_00000010"), OmegaConf.load(run / "config.yaml")
    found = set()
    for lora in (None, {"rank": 2, "alpha": 6.0}, {"rank": 2, "alpha": 12.0}):
        OmegaConf.save(OmegaConf.merge(config, {"finetune": {"lora": lora}}), run / "config.yaml")
        found.add(find(step)[0].identity)
    assert len(found) == 3


def test_the_state_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.tar").write_bytes(b"1")
    first = state_of(tmp_path)
    assert state_of(tmp_path) == first != state_of(tmp_path / "a" / "0.tar")
    os.utime(tmp_path / "a" / "0.tar", (1, 1))
    assert state_of(tmp_path) != first


def test_links_are_followed_and_may_lead_nowhere_or_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "0.tar").write_bytes(b"1")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "test").symlink_to(tmp_path / "real")
    (linked / "above").symlink_to(linked)
    (linked / "gone.txt").symlink_to(tmp_path / "nowhere")
    before = state_of(linked)
    assert state_of(linked) == before
    (tmp_path / "real" / "0.tar").write_bytes(b"22")
    assert state_of(linked) != before


def test_what_is_kept_tells_addresses_apart_and_holds_no_secret() -> None:
    keys = [work("", "x", {"root": f"https://me:{word}@host/x"}, "cpu").key for word in ("secret", "other")]
    assert "secret" not in str(keys) and keys[0] != keys[1] and "https://host/x" in str(keys[0])
