"""TorchScript archives are read as tensors: equal to their state dict, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import random
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from mmpretrain.errors import InputError
from mmpretrain.interop.files import read_tensors
from mmpretrain.interop.openai import from_state_dict
from tests.interop.openai_models import CONTEXT, released, tiny_clip


class Part(nn.Module):
    """All that a module can hold: parameters, buffers, plain tensors, numbers, lists, further modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6).T)  # not contiguous
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("halves", torch.randn(2, dtype=torch.float16))
        self.register_buffer("brains", torch.randn(2).to(torch.bfloat16))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.empty(0))
        self.plain = torch.ones(5)
        self.size = 7
        self.names: list[str] = ["a", "b"]
        self.numbers: list[int] = [1, 2]
        self.either: float = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.plain[:4].sum() * self.size + self.either


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(4, 6), Part(), nn.BatchNorm1d(4))
        self.again = self.parts[0]  # the same weights under two names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.parts(x))


def save(module: torch.jit.ScriptModule, path: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, path)
        return torch.jit.load(path).state_dict()


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out; the archives are there to stay
        return torch.jit.script(module)


def traced(module: nn.Module, *inputs: torch.Tensor) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, inputs, check_trace=False)


@pytest.fixture
def no_jit(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.jit.load was called")

    def forbid():
        monkeypatch.setattr(torch.jit, "load", refuse)
        monkeypatch.setattr(torch._C, "import_ir_module", refuse)
        monkeypatch.setattr(pickle, "Unpickler", refuse)

    return forbid


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("how", [scripted, lambda m: traced(m, torch.randn(2, 4))], ids=["scripted", "traced"])
def test_an_archive_gives_its_state_dict(how, tmp_path, no_jit):
    path = tmp_path / "tree.pt"
    expected = save(how(Tree().eval()), path)
    no_jit()
    assert_equal(read_tensors(path), expected)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_clip_as_openai_released_it_is_read_and_converted(kind, tmp_path, no_jit):
    from open_clip.model import convert_weights_to_fp16

    model = tiny_clip(kind)
    example = torch.randn(1, 3, *[64 if kind == "resnet" else 32] * 2), torch.zeros(1, CONTEXT, dtype=torch.int64)
    archive = traced(model, *example)
    convert_weights_to_fp16(model)
    path = tmp_path / "clip.pt"
    expected = save(archive, path)
    no_jit()
    found = read_tensors(path)
    assert_equal(found, expected)
    assert torch.float16 in {x.dtype for x in found.values()}
    converted = from_state_dict(found, "openai:clip.pt")
    assert converted.weights.keys() == from_state_dict(released(model)).weights.keys()


def with_pickle(source: Path, target: Path, content: bytes) -> Path:
    """A copy of an archive with another data.pkl."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            new.writestr(member, content if member.filename.endswith("/data.pkl") else old.read(member))
    return target


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "tree.pt"
    save(scripted(Tree().eval()), path)
    return path


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_an_archive_that_wants_to_run_code_is_refused(archive, tmp_path):
    marker = tmp_path / "ran"
    content = pickle.dumps(Calls(os.system, f"touch {marker}"), protocol=2)
    with pytest.raises(InputError, match=r"wants to call \w+\.system, which could run code: refused"):
        read_tensors(with_pickle(archive, tmp_path / "evil.pt", content))
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cantigravity\nfly\n.",  # a name that would be imported
        b"\x80\x02c__torch__.os\nsystem\n(X\x04\x00\x00\x00truetR.",  # a call of what looks like a module
        b"\x80\x02cbuiltins\nexec\n)\x81.",
        b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.",  # INST
        b"\x80\x02]]b.",  # BUILD on a list
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02.",
        b"\x80\x02N",
        b"",
        b"\x80\x02}}s.",
    ],
)
def test_other_pickles_end_in_an_error(content, archive, tmp_path):
    with pytest.raises(InputError, match=r"evil\.pt"):
        read_tensors(with_pickle(archive, tmp_path / "evil.pt", content))
    assert "antigravity" not in sys.modules


def tensor_pickle(size: int, stride: int, elements: int) -> bytes:
    """A module with one tensor of that size and stride on the archive's first storage."""

    def number(n: int) -> bytes:
        return b"J" + n.to_bytes(4, "little", signed=True)

    def text(word: str) -> bytes:
        return b"X" + len(word).to_bytes(4, "little") + word.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(elements) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0)
    tensor += b"(" + number(size) + b"t(" + number(stride) + b"t\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02c__torch__\nTop\n)\x81}" + text("weight") + tensor + b"sb."


def test_a_tensor_must_lie_within_what_is_stored(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        name = next(name for name in file.namelist() if name.endswith("/data/0"))
        elements = file.getinfo(name).file_size // 4
    good = read_tensors(with_pickle(archive, tmp_path / "good.pt", tensor_pickle(elements, 1, elements)))
    assert good["weight"].shape == (elements,)
    for size, stride, claimed in [(elements + 1, 1, elements), (2**30, 0, elements), (2, 1, elements + 1)]:
        with pytest.raises(InputError, match="damaged"):
            read_tensors(with_pickle(archive, tmp_path / "bad.pt", tensor_pickle(size, stride, claimed)))


def test_modules_that_share_parts_cannot_stand_for_endless_names(archive, tmp_path):
    # Each module holds the one before it twice: 2^60 names.
    content = b"\x80\x02c__torch__\nM\n)\x81}b" + b"q\x00"
    for _ in range(60):
        content += b"c__torch__\nM\n)\x81}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ubq\x00"
    with pytest.raises(InputError, match="more than 1000000 names"):
        read_tensors(with_pickle(archive, tmp_path / "bomb.pt", content + b"."))


def test_damage_ends_in_an_error_or_in_tensors(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        content = file.read(next(name for name in file.namelist() if name.endswith("/data.pkl")))
    chance = random.Random(0)
    ended = 0
    for _ in range(200):
        damaged = bytearray(content)
        place = chance.randrange(len(content))
        damaged[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        try:
            read_tensors(with_pickle(archive, tmp_path / "x.pt", bytes(damaged)))
        except InputError:
            ended += 1
    assert ended > 50


def test_compressed_numbers_are_refused(archive, tmp_path):
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    with pytest.raises(InputError, match="compressed"):
        read_tensors(tmp_path / "small.pt")
