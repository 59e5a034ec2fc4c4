"""Out: each encoder as an ONNX model, for any batch and text length, checked with ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpretrain.interop.out_folder import needed, new_folder
from mmpretrain.interop.parity import Parity, check
from mmpretrain.interop.programs import OUTPUT, Case, capture, cases, clear_errors, compare, inputs_used, write_inputs
from mmpretrain.pretrained import load

OPSET = 18
"""What torch's own translations are written in; ONNX Runtime reads it from 1.14 on."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_FILE = 1_900_000_000
"""Bytes of weights above which they lie beside the model, in `<name>.onnx.data`: protobuf ends at 2 GiB."""


def export(folder: str | Path, out: str | Path, tolerance: float = 1e-5, allow: Sequence[str] = ()) -> Parity:
    """Write `image.onnx` and `text.onnx` of a model folder into `out`, with `parity.json` and `inputs.json`.

    Inputs are `image` (B,3,S,S) uint8, and `text` (B,L) int64 with `mask` (B,L) bool, True = real; the output is
    `embedding` (B,E) float32 of unit norm; pixels are normalised inside. ONNX Runtime runs the files and is compared
    with the model. Raises `InputError` without the packages of the extra `onnx`, for an operator ONNX does not have,
    and beyond `tolerance`.
    """
    needed("onnx", *PACKAGES)
    pretrained = load(folder, allow=allow)
    encoders = cases(pretrained)
    with new_folder(out, "onnx") as temporary:
        outputs: dict[str, tuple[Tensor, Tensor]] = {}
        for case in encoders:
            path = temporary / f"{case.modality}.onnx"
            _write(case, path)
            with clear_errors(case.modality, "ONNX Runtime"):
                outputs |= compare(case, _runner(path, case.names))
        found = check(outputs, tolerance, {**inputs_used(encoders), "opset": OPSET}, "onnx", PACKAGES)
        found.write(temporary)
        files = {case.modality: f"{case.modality}.onnx" for case in encoders}
        write_inputs(temporary, folder, encoders, files, pretrained.model)
    return found


def _write(case: Case, path: Path) -> None:
    program = capture(case)
    names = tuple({axis: dim.__name__ for axis, dim in sizes.items()} for sizes in case.dynamic)
    with clear_errors(case.modality, "ONNX"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")  # two inputs share their sizes
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch 2.10 of its own code
        translated: Any = torch.onnx.export(
            program, input_names=case.names, dynamic_shapes=names, opset_version=OPSET, verbose=False
        )
        _name_output(translated.model.graph)
        translated.save(path, external_data=_bytes(case.module) > LARGEST_FILE)


def _name_output(graph: Any) -> None:
    """Call the output by its name; torch's own renaming lets it coincide with an inner value of that name."""
    for node in graph:
        for value in node.outputs:
            if value.name == OUTPUT:
                value.name = f"inner_{OUTPUT}"
    graph.outputs[0].name = OUTPUT


def _runner(path: Path, names: tuple[str, ...]) -> Callable[..., Tensor]:
    """Give a function that runs a file with ONNX Runtime on the CPU."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # else all cores, though this process was given fewer
    session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run([OUTPUT], feed)[0])

    return run


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])
