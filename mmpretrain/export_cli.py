"""`mmpretrain export`: a model folder of ours in the formats of other libraries, checked before it is kept."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmpretrain.errors import InputError

if TYPE_CHECKING:
    from mmpretrain.interop.parity import Parity

EXPORTERS = {
    "open_clip": "open_clip.create_model_and_transforms('local-dir:OUT') loads it",
    "huggingface": "transformers' from_pretrained loads it",
    "timm": "the image encoder, for timm.create_model",
    "onnx": "each encoder, for ONNX Runtime",
    "torch_export": "each encoder, for torch.export.load",
}
"""Format -> what it is good for; `mmpretrain.interop.FORMAT_out.export` writes it."""
TOLERANCE = 1e-5


def main(argv: Sequence[str]) -> int:
    """Run `mmpretrain export ARGV`; raises `InputError` for what cannot be exported, or would not be the same."""
    parser = argparse.ArgumentParser(
        prog="mmpretrain export",
        description="Write a model for another library, run it there, and keep it only if the outputs are the same.",
        epilog="formats:\n" + "\n".join(f"  {name:14}{what}" for name, what in EXPORTERS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", metavar="FORMAT", help="see below")
    parser.add_argument("model", metavar="MODEL", help="a model folder, a run, or a published model (openai:ViT-B/32)")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help=f"largest difference of an output that is accepted, in float32 (default: {TOLERANCE:g})",
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="PACKAGE", help="package of yours whose classes the model has"
    )
    args = parser.parse_args(argv)
    report = export(args.format, args.model, args.out, args.tolerance, args.allow)
    for output, error in report.errors.items():
        print(f"{output}: max abs error {error:.1e}")
    if report.said:
        print(report.said)
    print(f"{args.out}: exported for {args.format}; what was compared is in {args.out / 'parity.json'}")
    return 0


def export(
    format: str, model: str | Path, out: str | Path, tolerance: float = TOLERANCE, allow: Sequence[str] = ()
) -> Parity:
    """Export a model folder, or the published model of that name; returns what was compared, and how far apart it was.

    Raises `InputError` for an unknown format, a missing package, a model the format cannot hold, and outputs that
    differ by more than `tolerance`.
    """
    from mmpretrain.pretrained import locate

    if format not in EXPORTERS:
        raise InputError(f"no format {format!r}; expected one of {', '.join(EXPORTERS)}")
    if not 0 < tolerance < math.inf:
        raise InputError(f"tolerance is {tolerance}; expected a positive number such as {TOLERANCE:g}")
    folder = locate(model)
    exporter = importlib.import_module(f"mmpretrain.interop.{format}_out")
    report: Parity = exporter.export(folder, Path(out), tolerance=tolerance, allow=allow)
    return report
