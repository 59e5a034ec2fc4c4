"""The tensors of a TorchScript archive, read as data: nothing in it is imported, called or compiled.

The archive is a zip: `data.pkl` describes the tree of modules as a pickle, `data/0`, `data/1` ... are the numbers, and
`code/` is the program, of which only the lists of parameters and buffers are read, as text. The pickle is walked
operation by operation by the code below, in which a class is only a name and a call is one of few that rebuild tensors.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpretrain.errors import InputError

MOST_BYTES = {"data.pkl": 2**28, "code": 2**24}
MOST_NAMES, MOST_LEVELS = 1_000_000, 100
"""Modules that share parts could otherwise stand for any number of names."""
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
PUSHED = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING"),
    *("NONE", "NEWTRUE", "NEWFALSE"),
}
"""Operations whose argument is the value itself."""
LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Named(NamedTuple):
    """A class or function of a pickle: only what it is called."""

    module: str
    name: str


class Module:
    """An object of the archive: its class's name and its attributes."""

    __slots__ = ("attributes", "kind")

    def __init__(self, kind: Named) -> None:
        self.kind = kind
        self.attributes: dict[str, Any] = {}


class _Mark:
    """Where a list of operands begins on the stack."""


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read the parameters and buffers of a TorchScript archive: what its `state_dict()` would hold.

    Raises `InputError` for an archive that is damaged, or that wants more than tensors in modules.
    """
    try:
        with zipfile.ZipFile(path) as file:
            archive = _Archive(path, file)
            top = archive.unpickle()
            if not isinstance(top, Module):
                raise InputError(f"{path} holds no module but {type(top).__name__}; expected a saved ScriptModule")
            return dict(archive.tensors(top, "", 0))
    except InputError:
        raise
    except Exception as error:  # bytes of a stranger fail in zlib, in struct, in torch: there is no base in common
        raise InputError(f"{path} is a damaged TorchScript archive: {error}; fetch it again") from error


class _Archive:
    def __init__(self, path: Path, file: zipfile.ZipFile) -> None:
        self.path, self.file = path, file
        self.members = {member.filename: member for member in file.infolist()}
        self.prefix = next(name for name in self.members if name.endswith("constants.pkl"))[: -len("constants.pkl")]
        if self.prefix + "byteorder" in self.members and self.read("byteorder", 16).strip() != b"little":
            raise InputError(f"{path} was saved on a big-endian machine; save it again on another")
        self.storages: dict[str, Tensor] = {}
        self.declared: dict[Named, set[str] | None] = {}
        self.count = 0

    def read(self, name: str, most: int | None = None) -> bytes:
        """Return a member; the sizes a zip claims are checked against the limit before anything is read."""
        member = self.members[self.prefix + name]
        if member.compress_type != zipfile.ZIP_STORED and most is None:
            raise InputError(f"{self.path}: {name} is compressed, as torch.jit.save never writes it; refused")
        if most is not None and member.file_size > most:
            raise InputError(f"{self.path}: {name} has {member.file_size} bytes; expected at most {most}")
        return self.file.read(member)

    def unpickle(self) -> Any:
        """Walk `data.pkl`; returns what it describes."""
        stack: list[Any] = []
        memo: dict[Any, Any] = {}
        for operation, argument, _ in pickletools.genops(self.read("data.pkl", MOST_BYTES["data.pkl"])):
            name = operation.name
            if name == "STOP":
                return stack.pop()
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in PUSHED:
                stack.append(LITERALS.get(name, argument))
            elif name in EMPTY:
                stack.append(EMPTY[name]())
            elif name in TUPLES:
                stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
            elif name == "GLOBAL":
                module, _, called = str(argument).partition(" ")
                stack.append(Named(module, called))
            elif name == "MARK":
                stack.append(_Mark)
            elif name != "PROTO":
                self._combine(name, stack)
        raise ValueError("data.pkl has no end")

    def _combine(self, name: str, stack: list[Any]) -> None:
        """Carry out an operation that takes operands from the stack."""
        if name in ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"):
            operands = _to_mark(stack)
            if name in ("TUPLE", "LIST"):
                stack.append(operands if name == "LIST" else tuple(operands))
            elif name == "APPENDS":
                stack[-1].extend(operands)
            else:
                if name == "DICT":
                    stack.append({})
                stack[-1].update(zip(operands[::2], operands[1::2], strict=True))
            return
        operand = stack.pop()
        if name == "APPEND":
            stack[-1].append(operand)
        elif name == "SETITEM":
            key = stack.pop()
            stack[-1][key] = operand
        elif name == "BINPERSID":
            stack.append(self._storage(operand))
        elif name == "BUILD" and isinstance(stack[-1], Module):
            # Another state is of a class with its own way to be saved: nothing of it is a weight we could name.
            stack[-1].attributes = operand if isinstance(operand, dict) else {}
        elif name == "NEWOBJ" and isinstance(stack[-1], Named) and stack[-1].module.partition(".")[0] == "__torch__":
            stack[-1] = Module(stack[-1])
        elif name == "REDUCE" and isinstance(stack[-1], Named):
            stack[-1] = self._call(stack[-1], operand)
        else:
            raise InputError(f"{self.path}: its pickle has the operation {name}, which no TorchScript needs: refused")

    def _call(self, function: Named, arguments: Any) -> Any:
        """Stand in for the few functions that an archive may name."""
        if function == Named("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor(*arguments[:4])
        if function == Named("collections", "OrderedDict") and not arguments:
            return {}
        if function.module == "torch.jit._pickle" or function == Named("torch._utils", "_rebuild_parameter"):
            return arguments[0]
        if function == Named("torch", "device"):
            return None
        raise InputError(
            f"{self.path}: its pickle wants to call {function.module}.{function.name}, which could run code: refused"
        )

    def _storage(self, described: Any) -> Tensor:
        kind, dtype, key, _, size = described
        if kind != "storage" or not isinstance(dtype, Named) or not isinstance(size, int):
            raise ValueError("a storage is not described as one")
        if dtype.name not in DTYPES:
            raise InputError(f"{self.path}: numbers of the kind {dtype.name} are not read; save the model unquantized")
        if key not in self.storages:
            content = self.read(f"data/{key}")
            empty = torch.empty(0, dtype=torch.uint8)
            self.storages[key] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else empty
        storage = self.storages[key].view(DTYPES[dtype.name])
        if len(storage) != size:
            raise ValueError(f"data/{key} holds {len(storage)} numbers instead of {size}")
        return storage

    def _tensor(self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        # Out of bounds is torch's own error; a tensor that repeats what is stored would take any memory when copied.
        tensor = storage.as_strided(size, stride, offset)
        if tensor.numel() > storage.numel():
            raise ValueError(f"a tensor of {tensor.numel()} numbers is described by {storage.numel()}")
        return tensor

    def tensors(self, module: Module, prefix: str, level: int) -> Iterator[tuple[str, Tensor]]:
        """Walk a module's parameters and buffers, then those of the modules in it, each with its whole name."""
        self.count += 1 + len(module.attributes)
        if self.count > MOST_NAMES or level > MOST_LEVELS:
            raise ValueError(f"it has more than {MOST_NAMES} names, or modules over {MOST_LEVELS} deep")
        declared = self._declared(module.kind)
        for name, value in module.attributes.items():
            if isinstance(value, Tensor) and (declared is None or name in declared):
                yield prefix + name, value
        for name, value in module.attributes.items():
            if isinstance(value, Module):
                yield from self.tensors(value, f"{prefix}{name}.", level + 1)

    def _declared(self, kind: Named) -> set[str] | None:
        """Return the names of a class's parameters and buffers by its source text; None where that is not found."""
        if kind not in self.declared:
            file = f"code/{kind.module.replace('.', '/')}.py"
            text = self.read(file, MOST_BYTES["code"]).decode() if self.prefix + file in self.members else ""
            body = re.search(rf"^class {re.escape(kind.name)}\(.*?(?=^class |\Z)", text, re.M | re.S)
            lists = re.findall(r"^  __(parameters|buffers)__ = \[(.*?)\]$", body[0], re.M) if body else []
            names = {name for _, listed in lists for name in re.findall(r'"([^"]*)"', listed)}
            self.declared[kind] = names if len(lists) == 2 else None  # the oldest archives name no buffers
        return self.declared[kind]


def _to_mark(stack: list[Any]) -> list[Any]:
    """Take the operands from the last mark on off the stack."""
    operands = []
    while (operand := stack.pop()) is not _Mark:
        operands.append(operand)
    return operands[::-1]
