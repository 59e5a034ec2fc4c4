"""The manifest of a run: what it holds, that it can be read again, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mmpretrain import provenance
from mmpretrain.data.shards import Shard
from mmpretrain.errors import InputError
from mmpretrain.provenance import changes, comparable, describe_shards, git_state, manifest, read, record

CONFIG = {"seed": 3, "model": {"embed_dim": 16}, "run_dir": "/a", "resume": None, "data": {"train": "s"}}


def made(shards: Path) -> dict:
    return manifest(
        OmegaConf.create(CONFIG), {"image_text": [Shard(path) for path in sorted(shards.glob("*.tar"))]}, world_size=2
    )


def test_a_manifest_holds_what_decided_the_run(shards: Path, tmp_path: Path) -> None:
    path = record(tmp_path, made(shards), step=0)
    assert path == tmp_path / "manifest.json" and [p.name for p in tmp_path.iterdir()] == ["manifest.json"]
    found = read(tmp_path)
    assert found == json.loads(path.read_text()) and found["config"] == CONFIG
    assert found["seeds"]["seed"] == 3 and found["resumed"] == []
    source = found["shards"]["image_text"]
    assert source["samples"] == 64 and source["lost"] == 0 and len(source["shards"]) == 4
    assert source["shards"][1][:3] == [str(shards / "00001.tar"), 16, 0]
    assert {"mmpretrain", "torch", "lightning", "numpy"} <= found["packages"].keys()
    assert found["hardware"]["world_size"] == 2 and found["hardware"]["cores"] >= 1 and found["hardware"]["cpu"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_no_secret_reaches_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "s3cr3t")
    monkeypatch.setattr(
        "sys.argv", ["mmpretrain", "train", "logger.api_key=s3cr3t", "data.train=s3://u:s3cr3t@h/0.tar"]
    )
    config = OmegaConf.create({"seed": 0, "logger": {"api_key": "s3cr3t", "other": "${oc.env:A_KEY}"}})
    assert "s3cr3t" not in json.dumps(manifest(config, {}, world_size=1))


def test_a_resumed_run_notes_what_changed(shards: Path, tmp_path: Path) -> None:
    first = made(shards)
    record(tmp_path, first, step=0)
    again = {**first, "time": "later", "config": {**CONFIG, "resume": "auto", "model": {"embed_dim": 32}}}
    again["packages"] = {**first["packages"], "torch": "9.9"}
    record(tmp_path, again, step=7)
    record(tmp_path, {**first, "time": "last"}, step=9)
    found = read(tmp_path)
    assert {k: v for k, v in found.items() if k != "resumed"} == {k: v for k, v in first.items() if k != "resumed"}
    changed = {"config.model.embed_dim": [16, 32], "packages.torch": [first["packages"]["torch"], "9.9"]}
    assert found["resumed"] == [
        {"time": "later", "step": 7, "changed": changed},
        {"time": "last", "step": 9, "changed": {}},
    ]


def test_a_changed_shard_changes_its_digest_and_that_of_all(shards: Path, tmp_path: Path) -> None:
    data = (shards / "00000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data)
    before = describe_shards([Shard(tmp_path / "a.tar"), Shard(shards / "00001.tar")])
    (tmp_path / "a.tar").write_bytes(data.replace(b"red left", b"red LEFT"))
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    after = describe_shards([Shard(tmp_path / "a.tar"), Shard(shards / "00001.tar")])
    assert before["digest"] != after["digest"]
    assert [a == b for a, b in zip(before["shards"], after["shards"])] == [False, True]


def test_changes_are_named_by_dotted_keys() -> None:
    assert changes({"a": {"b": 1, "c": [1]}, "d": {}}, {"a": {"b": 2, "c": [1]}, "e": 0}) == {
        "a.b": [1, 2],
        "d": [{}, None],
        "e": [None, 0],
    }
    assert changes(CONFIG, CONFIG) == {}


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    run = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*run, *command], check=True)
    clean = git_state(tmp_path)
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "a").write_text("1")
    subprocess.run([*run, "add", "a"], check=True)
    dirty = git_state(tmp_path)
    assert dirty is not None and dirty["dirty"] is True and dirty["commit"] == clean["commit"]
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path)["difference"] != dirty["difference"]  # type: ignore[index]
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None


def test_programs_that_a_repository_names_are_not_run(tmp_path: Path) -> None:
    run = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*run, *command], check=True)
    script = tmp_path / "evil.sh"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    script.chmod(0o755)
    for key in ("core.fsmonitor", "diff.external", "diff.x.textconv"):
        subprocess.run([*run, "config", key, str(script)], check=True)
    (tmp_path / ".gitattributes").write_text("a diff=x\n")
    (tmp_path / "a").write_text("2")
    found = git_state(tmp_path)
    assert found is not None and found["dirty"] and not (tmp_path / "executed").exists()


WRONG = {
    "missing": (None, "holds no manifest.json"),
    "empty": (b"", "no manifest"),
    "no JSON": (b"\xff\xfe", "no manifest"),
    "a list": (b"[]", "no manifest"),
    "another format": (b'{"format": 99}', "format 99"),
    "half": (b'{"format": 1, "config": {}}', "no manifest"),
    "deep": (b'{"a":' * 100_000, "no manifest"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_manifest_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, words = WRONG[case]
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_manifest_with_anything_in_it_is_read_or_refused(shards: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = json.loads(json.dumps(made(shards) if not _SOUND else _SOUND[0]))
    _SOUND[:] = [json.loads(json.dumps(content))]
    place, keys = content, data.draw(st.integers(1, 3))
    for _ in range(keys):  # a random place of the manifest gets a random value
        key = data.draw(st.sampled_from(sorted(place)))
        if keys == 1 or not isinstance(place[key], dict) or not place[key]:
            break
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(values)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    try:
        found = read(tmp_path)
    except InputError:
        return
    assert isinstance(comparable(found), dict)


_SOUND: list[dict] = []


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("m")
    (folder / provenance.MANIFEST).write_bytes(data)
    with pytest.raises(InputError):
        read(folder)
