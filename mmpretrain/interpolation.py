"""`mmpretrain interpolate A B OUT`: a model between two of the same architecture (WiSE-FT, Wortsman et al. 2022)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.interop.names import check_keys
from mmpretrain.pretrained import PARTS, load, model_folder, read_config, save
from mmpretrain.provenance import changes
from mmpretrain.training.manifest import digest

TRAINING_ONLY = ("freeze", "gradient_checkpointing", "patch_drop_rate", "init", "pretrained")
"""Keys of a model's config that say how it is trained, not what it computes."""


def main(argv: Sequence[str]) -> int:
    """Run `mmpretrain interpolate ARGV`; raises `InputError` for models that do not fit each other."""
    parser = argparse.ArgumentParser(
        prog="mmpretrain interpolate",
        description="Write the model (1 - alpha) A + alpha B, weight by weight: between the model that fine-tuning "
        "began with (A) and what came of it (B) there often is one that is good at both tasks.",
    )
    parser.add_argument("first", type=Path, metavar="A", help="a model folder: alpha 0")
    parser.add_argument("second", type=Path, metavar="B", help="one of the same architecture: alpha 1")
    parser.add_argument("out", type=Path, metavar="OUT", help="the model folder to write")
    parser.add_argument("--alpha", type=float, default=0.5, help="from 0 (A) to 1 (B) (default: 0.5)")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="PACKAGE", help="package of yours whose classes the models have"
    )
    args = parser.parse_args(argv)
    folder = interpolate(args.first, args.second, args.out, args.alpha, args.allow)
    print(f"{folder}: {1 - args.alpha:g} of {args.first} and {args.alpha:g} of {args.second}")
    return 0


def interpolate(
    first: str | Path, second: str | Path, out: str | Path, alpha: float = 0.5, allow: Sequence[str] = ()
) -> Path:
    """Write the model (1 - alpha) `first` + alpha `second` as the model folder `out`, and return it.

    Raises `InputError` for an alpha outside [0, 1], where architecture, tokenizer or preprocessing differ, and for an
    `out` that is one of the two.
    """
    folders = [model_folder(Path(path)) for path in (first, second)]
    if Path(out).resolve() in [folder.resolve() for folder in folders]:
        raise InputError(f"{out} is one of the two models; give another folder, or its weights would be lost")
    configs = [read_config(folder) for folder in folders]
    for part in PARTS:
        differing = changes(*(_compared(config[part]) for config in configs))
        if differing:
            key, (a, b) = next(iter(differing.items()))
            raise InputError(
                f"{first} and {second} differ in {part}.{key}: {a!r} and {b!r}; give two of one architecture"
            )
    a, b = (load(path, allow=allow).model for path in (first, second))
    weights = between(a.state_dict(), b.state_dict(), alpha, str(second))
    b.load_state_dict(weights)
    return save(out, b, configs[1], source=f"mmpretrain interpolate --alpha {alpha:g}", allow=allow)


def between(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float, source: str = "b") -> dict[str, Tensor]:
    """Return (1 - alpha) a + alpha b of two states; exactly `a` at 0 and exactly `b` at 1.

    Raises `InputError` where names or shapes differ, or a tensor of whole numbers does.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is {alpha}; expected a number from 0 (the first model) to 1 (the second)")
    check_keys(b, a, source)
    found = {}
    for name, tensor in a.items():
        other = b[name]
        if tensor.is_floating_point():
            found[name] = tensor.double().lerp(other.double(), alpha).to(tensor.dtype)
        elif tensor.equal(other) or name.endswith("num_batches_tracked"):
            found[name] = other
        else:
            raise InputError(f"{name} holds whole numbers that differ; such a model cannot be interpolated")
    return found


def _compared(config: Any) -> Any:
    """Leave out of a part's config what does not change what it computes."""
    if isinstance(config, Mapping):
        kept = {key: value for key, value in config.items() if key not in TRAINING_ONLY}
        if "path" in kept:  # a file in the folder of the model: two of one name may differ
            file = Path(str(kept["path"]))
            kept["path"] = f"{file.name} (SHA-256 {digest(file)})" if file.is_file() else file.name
        return {key: _compared(value) for key, value in kept.items()}
    return config
