"""Each encoder with its projection as a program of tensors alone, and batches to compare an exported one on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mmpretrain.errors import InputError
from mmpretrain.model import MultimodalModel
from mmpretrain.pretrained import Pretrained, locate, read_config
from mmpretrain.types import Padded

SEED = 0
INPUTS = "inputs.json"
OUTPUT = "embedding"
MAX_BATCH = 2**20
TEXTS = ("a cat", "two dogs", "an owl in a tree", "a red bicycle leans against the wall of an old house")


class PictureEmbedder(nn.Module):
    """Pictures (B,C,H,W) uint8 -> (B,E) float32 unit vectors."""

    def __init__(self, model: MultimodalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """Embed."""
        return self.model.embed("image", image)


class TextEmbedder(nn.Module):
    """Ids (B,L) int64 and mask (B,L) bool, True = real -> (B,E) float32 unit vectors."""

    def __init__(self, model: MultimodalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Embed."""
        return self.model.embed("text", Padded(text, mask))


class Case(NamedTuple):
    """One encoder to export: the names of its inputs, the sizes that may change, and batches to compare it on."""

    modality: str
    module: nn.Module
    names: tuple[str, ...]
    dynamic: tuple[dict[int, Dim], ...]
    batches: list[tuple[Tensor, ...]]


def cases(pretrained: Pretrained) -> list[Case]:
    """List a model's image and text encoder, in float32 and evaluation mode, each alone with its projection.

    A picture's height and width are fixed. The length of texts may change up to the context length, unless the encoder
    reads padding, which then needs all positions. Raises `InputError` for a model with another encoder.
    """
    model, preprocess, tokenizer = pretrained
    if unknown := set(model.encoders) - {"image", "text"}:
        raise InputError(
            f"the model has encoders for {', '.join(sorted(unknown))}, whose inputs no exporter knows; "
            "export a model of image and text alone"
        )
    if not isinstance(getattr(preprocess, "image_size", None), int):
        raise InputError(f"{preprocess!r} makes pictures of several sizes; exporters need those of one (image_size)")
    batch = Dim("batch", min=1, max=MAX_BATCH)
    found = []
    if "image" in model.encoders:
        pictures = PictureEmbedder(_alone(model, "image")).eval()
        found.append(Case("image", pictures, ("image",), ({0: batch},), _pictures(preprocess.image_size)))
    if "text" in model.encoders:
        encoder = model.encoders["text"]
        fixed = bool(getattr(encoder, "reads_padding", False))
        sizes = {0: batch} if fixed else {0: batch, 1: Dim("length", min=1, max=tokenizer.context_length)}
        texts = TextEmbedder(_alone(model, "text")).eval()
        found.append(Case("text", texts, ("text", "mask"), (sizes, sizes), _texts(tokenizer, fixed)))
    return found


def capture(case: Case) -> ExportedProgram:
    """Record an encoder as a program for any batch and text length; `InputError` where it cannot be recorded."""
    with clear_errors(case.modality, "torch.export"), torch.no_grad():
        return torch.export.export(case.module, case.batches[1], dynamic_shapes=case.dynamic, strict=False)


def compare(case: Case, run: Callable[..., Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the exported encoder and ours on every batch of the case: name of the batch -> (theirs, ours)."""
    found = {}
    for inputs in case.batches:
        name = f"{case.modality} {'x'.join(str(size) for size in inputs[0].shape)}"
        with torch.no_grad():
            found[name] = (run(*inputs), case.module(*inputs))
    return found


def inputs_used(cases: Sequence[Case]) -> dict[str, Any]:
    """Describe the batches of the comparison for its report."""
    shapes = {case.modality: [list(inputs[0].shape) for inputs in case.batches] for case in cases}
    return {"seed": SEED, "shapes": shapes, "texts": list(TEXTS)}


def write_inputs(
    out: Path, folder: str | Path, cases: Sequence[Case], files: Mapping[str, str], model: MultimodalModel
) -> None:
    """Write `inputs.json`: how to make each file's inputs, and what turns embeddings into scores; copy the tokenizer.

    `preprocess` and `tokenizer` are as the model's config has them; `folder` is the model's.
    """
    config = read_config(locate(folder))
    parts = {part: dict(config[part]) for part in ("preprocess", "tokenizer")}
    if "path" in parts["tokenizer"]:
        file = Path(parts["tokenizer"]["path"])
        parts["tokenizer"]["path"] = shutil.copyfile(file, out / file.name).name
    scale, bias = model.logit_scale, model.logit_bias
    content = {
        "encoders": {case.modality: {"file": files[case.modality], "inputs": _described(case)} for case in cases},
        "output": {"name": OUTPUT, "shape": ["batch", model.embed_dim], "dtype": "float32", "unit_norm": True},
        "logit_scale": float(scale.detach().exp()),
        "logit_bias": None if bias is None else float(bias.detach()),
        **parts,
    }
    (out / INPUTS).write_text(json.dumps(content, indent=1), encoding="utf-8")


@contextmanager
def clear_errors(modality: str, target: str) -> Iterator[None]:
    """Turn whatever an exporter raises into an `InputError` that names the encoder and, if it can, the operator."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # exporters raise errors of many kinds, with no base in common
        operator = next(filter(None, map(_operator, _chain(error))), None)
        reason = " ".join(str(error).split())[:400] if operator is None else f"it has no form of {operator}"
        raise InputError(
            f"the {modality} encoder cannot be exported by {target}: {reason}. "
            "Replace that part of the encoder, or export another format"
        ) from error


OPERATOR = re.compile(r"OpOverload\(op='([\w.]+)'")


def _operator(error: BaseException) -> str | None:
    """Name the operator an exporter complains of."""
    if match := OPERATOR.search(str(error)):
        return match[1]
    function = getattr(error, "func", None)  # torch's UnsupportedOperatorException
    return None if function is None else str(function)


def _chain(error: BaseException | None) -> list[BaseException]:
    """List an error and what caused it, the first cause first: later ones only report it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.insert(0, error)
        error = error.__cause__ or error.__context__
    return found


def _alone(model: MultimodalModel, modality: str) -> MultimodalModel:
    encoder, projection = model.encoders[modality], model.projections[modality]
    return MultimodalModel(model.embed_dim, {modality: encoder}, projections={modality: projection}).float().eval()


def _described(case: Case) -> dict[str, Any]:
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": [sizes[axis].__name__ if axis in sizes else size for axis, size in enumerate(tensor.shape)],
        }
        for name, sizes, tensor in zip(case.names, case.dynamic, case.batches[0], strict=True)
    }


def _pictures(size: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(SEED)
    return [(torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8),) for n in (1, 2, 5)]


def _texts(tokenizer: Callable[[Sequence[str]], Padded], fixed: bool) -> list[tuple[Tensor, ...]]:
    """Tokenize short, middling and full-length texts; the first two without the padding that all rows share."""
    found: list[tuple[Tensor, ...]] = []
    for texts in (TEXTS[:1], TEXTS[:3], (*TEXTS, " ".join(TEXTS * 20))):
        ids, mask, _ = tokenizer(texts)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        longest = ids.shape[1] if fixed else int(mask.sum(1).max())
        found.append((ids[:, :longest].contiguous(), mask[:, :longest].contiguous()))
    return found
