"""Checkpoints on disk: what goes in comes out, what was changed is refused, the last good one is never lost."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpretrain.errors import InputError
from mmpretrain.training.checkpoint import load, newest, save, shapes
from mmpretrain.training.folder import best_value, checkpoints, link, linked, mark_best
from mmpretrain.training.manifest import DamagedCheckpoint, Manifest, read_manifest, verify, write_manifest
from mmpretrain.training.state_json import MAX_DEPTH, pack, unpack

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
]


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def test_every_value_comes_back_as_it_was(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "state_dict": {str(dtype): torch.ones(3, 2).to(dtype) for dtype in DTYPES},
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(3.0)}, 7: {}}, "param_groups": [{"betas": (0.9, 0.98)}]}
        ],
        "odd": {
            "transposed": whole.t(),
            "slice": whole[1:3, ::2],
            "empty": torch.empty(0, 3),
            "nan": torch.tensor([math.nan, 1.0, -math.inf]),
            "parameter": torch.nn.Parameter(whole),
        },
        "numbers": [0, -1, 10**30, 0.1, 1e-320, math.inf, -math.inf, math.nan, True, False, None, -0.0],
        "text": {"": "", "a/../b": "é\n\0\ud800", "tensor": {"tensor": "x"}, "dict": [()]},
        (1, "two"): {None: 1, True: 2, 2.5: 3},
        "numpy": [1, 2.0],
    }
    save(tmp_path, {**state, "numpy": [np.int64(1), np.float32(2.0)]}, 5)
    got = load(tmp_path / "step_00000005")
    state["odd"]["parameter"] = whole
    assert equal(got, state)
    assert math.copysign(1, got["numbers"][-1]) == -1


def test_a_tensor_that_occurs_twice_is_stored_once_and_views_are_not_confused(tmp_path):
    weight = torch.rand(100, 100)
    path = save(tmp_path, {"state_dict": {"a": weight, "b": weight, "c": weight[:50], "d": weight.t()}}, 1)
    got = load(path)["state_dict"]
    assert got["a"] is got["b"]
    assert torch.equal(got["c"], weight[:50]) and torch.equal(got["d"], weight.t())
    assert (path / "state_dict-00001.safetensors").stat().st_size < 4 * 26_000
    assert shapes(path) == {"a": (100, 100), "b": (100, 100), "c": (50, 100), "d": (100, 100)}


def test_names_that_meet_do_not_mix_tensors(tmp_path):
    state = {"a": {"b.c": torch.tensor(1), "b": {"c": torch.tensor(2)}}, "a.b": {"c": torch.tensor(3)}}
    assert equal(load(save(tmp_path, state, 1)), state)


def test_large_states_are_spread_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr("mmpretrain.training.checkpoint.FILE_BYTES", 1000)
    state = {"state_dict": {str(i): torch.rand(100) for i in range(7)}}
    path = save(tmp_path, state, 1)
    assert len([*path.glob("state_dict-*.safetensors")]) == 3
    assert equal(load(path), state)


class Odd:
    """Nothing that JSON has."""


@pytest.mark.parametrize(
    "value", [Odd(), {1, 2}, b"bytes", lambda: 0, torch.rand(2).to_sparse(), torch.empty(2, device="meta")]
)
def test_what_would_need_unpickling_is_refused_with_its_place(value, tmp_path):
    with pytest.raises(InputError, match=r"callbacks\.mine\.0"):
        save(tmp_path, {"callbacks": {"mine": [value]}}, 1)
    assert newest(tmp_path).path is None


def test_too_deep_is_refused(tmp_path):
    deep: object = 0
    for _ in range(MAX_DEPTH + 2):
        deep = [deep]
    with pytest.raises(InputError, match="deeper than"):
        pack(deep)
    with pytest.raises(ValueError, match="too deep"):
        path = save(tmp_path, {}, 1)
        replace_state(path, b"[" * 100_000)
        load(path)


def test_the_two_newest_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, {"step": step}, step)
        if step == 2:
            mark_best(tmp_path, 2, "recall", 0.5)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000004", "step_00000003", "step_00000002"]
    assert linked(tmp_path, "latest") == tmp_path / "step_00000004"
    assert (tmp_path / "latest").readlink().as_posix() == "step_00000004"  # a link that moves with its folder
    assert best_value(tmp_path, "recall", 4) == 0.5
    assert best_value(tmp_path, "other", 4) is None and best_value(tmp_path, "recall", 1) is None
    mark_best(tmp_path, 3, "recall", 0.7)  # not what was saved last: that save failed
    assert best_value(tmp_path, "recall", 4) == 0.5
    (tmp_path / "best.json").write_text("[]")
    assert best_value(tmp_path, "recall", 4) is None


def test_one_that_was_never_named_is_not_taken_and_never_written_over(tmp_path):
    save(tmp_path, {"course": 1}, 1)
    save(tmp_path, {"course": 1}, 2)
    link(tmp_path, "latest", "step_00000001")  # as if killed between the rename and the link
    assert newest(tmp_path).path == tmp_path / "step_00000001"
    path = save(tmp_path, {"course": 2}, 2)
    assert newest(tmp_path).path == path == tmp_path / "step_00000002.1"
    assert load(path) == {"course": 2} and not (tmp_path / "step_00000002").exists()


def test_going_back_leaves_the_later_course(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, {}, step, keep=3)
    save(tmp_path, {}, 15, keep=3)  # resumed from 10
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000015", "step_00000010"]


def test_without_the_link_the_newest_is_taken(tmp_path):
    for step in (1, 2):
        save(tmp_path, {}, step)
    (tmp_path / "latest").unlink()
    assert newest(tmp_path).path == tmp_path / "step_00000002"
    assert newest(tmp_path / "nowhere") == (None, [])


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    save(tmp_path, {}, 1)
    save(tmp_path, {}, 2).rename(tmp_path / "step_00000003")
    (tmp_path / "latest").unlink()
    found = newest(tmp_path)
    assert found.path == tmp_path / "step_00000001" and "step 2" in found.refused[0]


def test_left_overs_of_killed_saves_go_at_the_next_one(tmp_path):
    (tmp_path / ".step_00000001.99").mkdir()
    (tmp_path / ".step_00000001.99" / "state.json").write_text("half")
    (tmp_path / ".latest.99").symlink_to("step_00000001")
    save(tmp_path, {}, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000002", "latest"}


def test_unknown_missing_and_linked_files_are_refused(tmp_path):
    path = save(tmp_path, {"state_dict": {"a": torch.rand(3)}}, 1)
    (path / "extra.bin").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match=r"extra\.bin is no file of this checkpoint"):
        load(path)
    (path / "extra.bin").unlink()
    weights = path / "state_dict-00001.safetensors"
    weights.rename(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="safetensors is missing"):
        verify(path)
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="is no file"):
        load(path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", ".hidden", "manifest.json", ""])
def test_a_manifest_cannot_name_files_outside(name, tmp_path):
    write_manifest(tmp_path, Manifest(1, "plain", {"state.json": (2, "x"), name: (1, "y")}))
    with pytest.raises(DamagedCheckpoint, match="cannot hold"):
        load(tmp_path)


def test_every_changed_byte_of_a_manifest_is_found(tmp_path):
    path = save(tmp_path, {"a": 1}, 1)
    whole = (path / "manifest.json").read_bytes()
    for position in range(len(whole)):
        (path / "manifest.json").write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
            read_manifest(path)


def test_another_format_is_named(tmp_path):
    path = save(tmp_path, {}, 1)
    text = (path / "manifest.json").read_text().replace('"format":1', '"format":2')
    (path / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match="format 2"):
        load(path)


def replace_state(path, data: bytes) -> None:
    """Put other bytes into state.json, with a manifest that agrees."""
    manifest = read_manifest(path)
    (path / "state.json").write_bytes(data)
    (path / "manifest.json").unlink()
    entry = (len(data), hashlib.sha256(data).hexdigest())
    write_manifest(path, manifest._replace(files={**manifest.files, "state.json": entry}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dict", "items", "tuple", "float", "tensor", "x", "files"]) | st.text(), inner
        )
    ),
    max_leaves=20,
)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(content=JSON | st.just({"dict": {"a": {"tensor": "a"}}}))
def test_any_json_as_state_is_refused_or_read(content, tmp_path_factory):
    path = save(tmp_path_factory.mktemp("fuzz"), {"a": torch.ones(1)}, 1)
    replace_state(path, json.dumps(content).encode())
    try:
        assert isinstance(load(path), dict)
    except DamagedCheckpoint as error:
        assert "state.json" in str(error)


@FUZZ
@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_manifest_or_state_are_refused(data, tmp_path_factory):
    path = save(tmp_path_factory.mktemp("fuzz"), {"a": torch.ones(1)}, 1)
    replace_state(path, data)
    try:
        load(path)
    except DamagedCheckpoint as error:
        assert "state.json" in str(error)
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        load(path)


@FUZZ
@given(
    fields=st.fixed_dictionaries(
        {
            "format": st.just(1) | JSON,
            "step": st.integers() | JSON,
            "layout": st.just("plain") | JSON,
            "files": st.dictionaries(st.text(max_size=9) | st.just("state.json"), st.tuples(st.integers(), st.text()))
            | JSON,
            "sha256": st.text(max_size=5),
        }
    )
)
def test_manifests_of_the_right_form_are_refused_all_the_same(fields, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    (path / "manifest.json").write_text(json.dumps(fields, separators=(",", ":")))
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        load(path)


@FUZZ
@given(content=JSON)
def test_what_is_plain_packs_and_unpacks(content):
    packed = pack({"x": content})
    assert equal(unpack(packed.tree, dict), {"x": content})
