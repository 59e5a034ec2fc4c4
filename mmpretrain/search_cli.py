"""`mmpretrain search`: what of a folder of embeddings is nearest to a text or a picture."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpretrain.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Run `mmpretrain search ARGV` and return the exit status."""
    args = _parser().parse_args(argv)
    if (args.text is None) == (args.image is None):
        raise InputError("give a text to search for, or a picture with --image, not both")
    if args.text is not None and not args.text.strip():
        raise InputError("the text to search for is empty")
    if args.k < 1:
        raise InputError(f"-k is {args.k}; give at least 1")
    from mmpretrain.embedding.index import VectorIndex

    index = VectorIndex.open(args.index)
    query = _embedded(index.store.manifest, args)
    start = time.perf_counter()
    hits = index.search(query, args.k)
    seconds = time.perf_counter() - start
    if args.json:
        print(json.dumps([hit._asdict() for hit in hits], ensure_ascii=False))
    else:
        for hit in hits:
            print(f"{hit.score:7.4f}  {hit.path}" + (f"  {hit.text}" if hit.text else ""))
        about = index.about
        read = "all" if about.lists == 1 else f"{about.probes} of {about.lists} lists"
        print(f"{1000 * seconds:.1f} ms over {about.embeddings:,} embeddings ({read})", file=sys.stderr)
    if args.html is not None:
        from mmpretrain.embedding.gallery import write_gallery

        write_gallery(args.html, str(args.image) if args.text is None else args.text, hits, index.store.manifest)
        print(f"written to {args.html}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmpretrain search",
        description="Search in what `mmpretrain embed` wrote. The first search builds an index, which is kept.",
    )
    add = parser.add_argument
    add("index", type=Path, metavar="INDEX", help="folder of embeddings")
    add("text", nargs="?", metavar="TEXT", help="what to search for")
    add("--image", type=Path, metavar="FILE", help="search for what is like this picture")
    add("-k", type=int, default=10, metavar="N", help="how many answers (default: 10)")
    add("--json", action="store_true", help="print one JSON list")
    add("--html", type=Path, metavar="FILE", help="also write a page with the pictures")
    add("--model", metavar="MODEL", help="the model, if it lies elsewhere than when the embeddings were made")
    add("--allow", action="append", default=[], metavar="PACKAGE", help="a package of yours that the model is built of")
    return parser


def _embedded(manifest: Any, args: argparse.Namespace) -> Any:
    """Embed the query by the model of the embeddings: a unit vector (E,)."""
    from mmpretrain.data.decode import Image
    from mmpretrain.embedding.run import embed_values, model_digest
    from mmpretrain.pretrained import load, locate

    try:
        folder = locate(args.model or manifest.model)
    except InputError as error:
        if args.model is not None:
            raise
        raise InputError(
            f"the model of {args.index} is not where it was ({error}); say with --model where it is"
        ) from error
    if model_digest(folder) != manifest.model_digest:
        raise InputError(
            f"{folder} is another model (weights, config or tokenizer) than that of {args.index}; "
            "give that one with --model, or embed again"
        )
    pretrained = load(folder, allow=args.allow)
    if args.text is not None:
        return embed_values(pretrained, "text", [args.text], "cpu")[0]
    import torch

    sample = {"__key__": str(args.image), "picture": args.image.read_bytes()}
    pixels = Image(pretrained.preprocess, extensions=("picture",))(sample, torch.Generator())
    return embed_values(pretrained, "image", [pixels], "cpu")[0]
