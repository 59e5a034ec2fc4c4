"""Out: each encoder as a `torch.export` program (.pt2), for any batch and text length."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmpretrain.interop.out_folder import new_folder
from mmpretrain.interop.parity import Parity, check
from mmpretrain.interop.programs import capture, cases, compare, inputs_used, write_inputs
from mmpretrain.pretrained import load


def export(folder: str | Path, out: str | Path, tolerance: float = 1e-5, allow: Sequence[str] = ()) -> Parity:
    """Write `image.pt2` and `text.pt2` of a model folder into `out`, with `parity.json` and `inputs.json`.

    `torch.export.load(file).module()` takes `image` (B,3,S,S) uint8, or `text` (B,L) int64 and `mask` (B,L) bool, and
    gives (B,E) float32 unit vectors; pixels are normalised inside. The files are loaded again and compared with the
    model. Raises `InputError` where an encoder cannot be recorded, and beyond `tolerance`.
    """
    pretrained = load(folder, allow=allow)
    encoders = cases(pretrained)
    with new_folder(out, "torch_export") as temporary:
        outputs: dict[str, tuple[Tensor, Tensor]] = {}
        for case in encoders:
            path = temporary / f"{case.modality}.pt2"
            torch.export.save(capture(case), path)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.10 of its own code
                module = torch.export.load(path).module()
            outputs |= compare(case, module)
        found = check(outputs, tolerance, inputs_used(encoders), "torch_export")
        found.write(temporary)
        files = {case.modality: f"{case.modality}.pt2" for case in encoders}
        write_inputs(temporary, folder, encoders, files, pretrained.model)
    return found
