"""Weights are read from every usual file by what is in it, and a pickle that wants more is refused."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmpretrain.errors import InputError
from mmpretrain.interop.files import HUGGINGFACE, read_tensors

WEIGHTS = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3).half(), "count": torch.tensor(4)}


def same(found) -> bool:
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


class Evil:
    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.bin", "without_ending"])
def test_safetensors_under_any_name(name, tmp_path):
    save_file(WEIGHTS, tmp_path / name)
    assert same(read_tensors(tmp_path / name))


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "epoch": 3, "name": "x"},
        {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in WEIGHTS.items()}, "optimizer": {"state": {0: {}}}},
        {f"module._orig_mod.{k}": v for k, v in WEIGHTS.items()},
        {"model": WEIGHTS},
        {f"_orig_mod.module.module.{k}": v for k, v in WEIGHTS.items()},
        {"model": {"width": 3}, "state_dict": WEIGHTS, "rng": {"cuda": torch.zeros(2)}},
    ],
    ids=["plain", "wrapped", "trainer", "compiled", "model", "twice", "beside settings"],
)
def test_checkpoints_of_torch_save(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    assert same(read_tensors(tmp_path / "x.pt"))


@pytest.mark.parametrize(
    ("other", "values"),
    [("model", {"b": torch.ones(1)}), ("state_dict_ema", {f"module.{k}": v + 1 for k, v in WEIGHTS.items()})],
)
def test_a_checkpoint_with_several_sets_of_weights_is_refused(other, values, tmp_path):
    torch.save({other: values, "state_dict": WEIGHTS, "optimizer": {"state": {}}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=f"several sets of weights: state_dict, {other}; save the one"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_index_of_several_files(ending, tmp_path):
    save = save_file if ending == "safetensors" else torch.save
    places = {"a.weight": f"x-1-of-2.{ending}", "a.bias": f"x-2-of-2.{ending}", "count": f"x-2-of-2.{ending}"}
    for file in set(places.values()):
        save({name: WEIGHTS[name] for name in places if places[name] == file}, tmp_path / file)
    index = tmp_path / ("model.safetensors.index.json" if ending == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert same(read_tensors(index))
    assert same(read_tensors(tmp_path))  # found by its name
    (tmp_path / f"x-2-of-2.{ending}").unlink()
    with pytest.raises(InputError, match=r"names x-2-of-2\.\w+, which is not there; fetch all 2 files"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"a": "../x.safetensors"}, "do not lie beside it"),
        ({"a": "/etc/passwd"}, "do not lie beside it"),
        ({"a": "model.safetensors.index.json"}, "do not lie beside it"),
        ({"a": 3}, "no index"),
        ({"a.weight": "x.safetensors"}, "do not agree on a.bias, count"),
    ],
)
def test_an_index_that_is_not_right_is_refused(places, said, tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=said):
        read_tensors(tmp_path / "model.safetensors.index.json")


def test_a_second_copy_of_a_tensor_in_another_file_is_refused(tmp_path):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "2.safetensors")
    places = {"a": "2.safetensors", "b": "1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=r"and 1\.safetensors do not agree on a \(1 names"):
        read_tensors(tmp_path)


def test_prefixes_in_an_index_are_removed_from_all_files_together(tmp_path):
    save_file({"module.a": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"module.b": torch.zeros(1)}, tmp_path / "2.safetensors")
    places = {"module.a": "1.safetensors", "module.b": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert set(read_tensors(tmp_path)) == {"a", "b"}


def test_a_folder_may_hold_the_weights_for_two_libraries(tmp_path):
    save_file({"theirs": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    save_file({"transformers": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert set(read_tensors(tmp_path)) == {"theirs"}
    assert set(read_tensors(tmp_path, HUGGINGFACE)) == {"transformers"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_that_wants_to_run_code_is_refused(wrapped, tmp_path):
    evil = Evil(tmp_path / "ran")
    torch.save({**WEIGHTS, "x": evil} if not wrapped else {"state_dict": WEIGHTS, "x": evil}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"wants to use \w+\.system, which could run code: refused"):
        read_tensors(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_is_refused_unread(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(InputError, match="plain pickle"):
        read_tensors(tmp_path / "x.pt")
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="plain pickle"):
        read_tensors(tmp_path / "old.pt")
    assert not (tmp_path / "ran").exists()


def test_formats_that_are_not_read_are_named(tmp_path):
    (tmp_path / "x.txt").write_text("weights")
    with pytest.raises(InputError, match=r"x\.txt is no file of weights that is read; expected safetensors"):
        read_tensors(tmp_path / "x.txt")
    np.savez(tmp_path / "x.npz", a=np.zeros(2))
    with pytest.raises(InputError, match=r"x\.npz is a zip file without data\.pkl"):
        read_tensors(tmp_path / "x.npz")
    with pytest.raises(InputError, match="does not exist"):
        read_tensors(tmp_path / "nothing.pt")
    with pytest.raises(InputError, match="holds no weights: none of open_clip_model"):
        read_tensors(tmp_path)


def test_damaged_files_are_named(tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    torch.save(WEIGHTS, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=f"{name} is .*damaged"):
            read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "no dictionary of tensors but list"),
        ({}, "no dictionary of tensors but dict"),
        ({"a": torch.zeros(2), "b": "text", "c": 3}, "no dictionary of tensors: b, c"),
        ({"a": torch.zeros(1).expand(2**40)}, "a is no dense tensor of its own"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is no dense tensor"),
        ({"a": torch.zeros(2, device="meta")}, "a is no dense tensor"),
    ],
)
def test_what_is_not_plain_weights_is_refused(content, said, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=said):
        read_tensors(tmp_path / "x.pt")


def test_a_compressed_checkpoint_is_refused(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    with pytest.raises(InputError, match="compressed"):
        read_tensors(tmp_path / "y.pt")
