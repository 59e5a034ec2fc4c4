"""`mmpretrain convert`: weights of other libraries into a model folder of ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmpretrain.errors import InputError

if TYPE_CHECKING:
    from mmpretrain.interop.converted import Converted

EXAMPLES = """sources:
  open_clip:NAME --weights FILE       a model config of open_clip by name (`ViT-B-32`), and a file with its weights
  open_clip:FOLDER                    a folder with open_clip_config.json and weights
  openai: --weights FILE              OpenAI's CLIP: TorchScript archive or state dict; sizes are read off it
  huggingface:FOLDER                  a folder written by save_pretrained of CLIPModel, SiglipModel or Siglip2Model
  open_clip:NAME/TAG, openai:ViT-B/32, hf-hub:org/name      published models, which are fetched
  package:NAME                        a sentence encoder that an installed Python package holds

A file of weights is safetensors, a checkpoint of torch.save, a TorchScript archive or the index of several. It is read
as tensors: nothing in it is run."""


class Given(NamedTuple):
    """What the command line says beside the kind of source."""

    target: str
    weights: Path | None
    tokenizer: Path | None


def main(argv: Sequence[str]) -> int:
    """Run `mmpretrain convert ARGV`; raises `InputError` for what cannot be converted."""
    parser = argparse.ArgumentParser(
        prog="mmpretrain convert",
        description="Convert a model of another library into a model folder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="what to convert, see below")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="file with the weights, or its folder")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="tokenizer.json, or its folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the model folder to write")
    args = parser.parse_args(argv)
    folder = convert(args.source, args.out, args.weights, args.tokenizer)
    print(f"{args.source} is now {folder}: mmpretrain.load({str(folder)!r})")
    return 0


def convert(source: str, out: str | Path, weights: Path | None = None, tokenizer: Path | None = None) -> Path:
    """Convert `source` ("kind:target") into the model folder `out`, and return it.

    Raises `InputError` for an unknown kind, and for weights, configs and tokenizers that do not fit.
    """
    from mmpretrain.interop.converted import write

    kind, colon, target = source.partition(":")
    if kind not in IMPORTERS or not colon:
        kinds = ", ".join(f"{kind}:" for kind in IMPORTERS)
        raise InputError(f"source {source!r} is of no known format; expected one that begins with {kinds}")
    return write(IMPORTERS[kind](Given(target, weights, tokenizer)), out)


def _open_clip(given: Given) -> Converted:
    from mmpretrain.interop.open_clip_in import from_name

    if not given.target:
        raise InputError("open_clip: needs a name such as open_clip:ViT-B-32, or a folder")
    if given.weights is None and not Path(given.target).is_dir():
        return _fetched("open_clip", given)
    return from_name(given.target, given.weights, tokenizer=given.tokenizer)


def _openai(given: Given) -> Converted:
    from mmpretrain.interop.files import read_tensors
    from mmpretrain.interop.openai import from_state_dict

    if given.tokenizer is not None:
        raise InputError("OpenAI's CLIP has one tokenizer, which comes with this package; leave --tokenizer out")
    if given.weights is None:
        if not given.target:
            raise InputError("openai: needs --weights FILE, or the name of a published model such as openai:ViT-B/32")
        return _fetched("openai", given)
    return from_state_dict(read_tensors(given.weights), f"openai:{given.target or given.weights.name}")


def _huggingface(given: Given) -> Converted:
    from mmpretrain.interop.huggingface_in import from_folder

    if given.weights is not None or given.tokenizer is not None:
        raise InputError("huggingface:FOLDER holds weights and tokenizer; leave --weights and --tokenizer out")
    return from_folder(Path(given.target))


def _hub(given: Given) -> Converted:
    return _with_its_weights("hf-hub", given)


def _package(given: Given) -> Converted:
    return _with_its_weights("package", given)


def _with_its_weights(kind: str, given: Given) -> Converted:
    if given.weights is not None:
        raise InputError(f"{kind}:{given.target} holds the weights; leave --weights out")
    return _fetched(kind, given)


def _fetched(kind: str, given: Given) -> Converted:
    """Fetch a published model, which is named without files."""
    from mmpretrain.interop.remote import fetch

    if given.tokenizer is not None:
        raise InputError(f"{kind}:{given.target} is fetched with its tokenizer; leave --tokenizer out")
    made = fetch(f"{kind}:{given.target}")
    if isinstance(made, Path):
        raise InputError(
            f"{kind}:{given.target} is a model folder already: mmpretrain.load({f'{kind}:{given.target}'!r})"
        )
    return made


IMPORTERS: dict[str, Callable[[Given], Converted]] = {
    "open_clip": _open_clip,
    "openai": _openai,
    "huggingface": _huggingface,
    "hf-hub": _hub,
    "package": _package,
}
"""Format -> what makes a model in our terms of it."""
