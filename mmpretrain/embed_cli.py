"""`mmpretrain embed`: the embeddings of a whole data set, as files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmpretrain.data.sources import TABLES
from mmpretrain.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Run `mmpretrain embed ARGV` and return the exit status."""
    args = _parser().parse_args(argv)
    from mmpretrain.embedding.parts import LOST, Manifest, Store
    from mmpretrain.embedding.run import Job, embed, field_of, model_digest
    from mmpretrain.embedding.sources import open_source
    from mmpretrain.pretrained import load, locate

    for name, least in (("batch_size", 1), ("part_size", 1), ("processes", 1), ("workers", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least {least}")
    devices = _devices(args.device, args.processes)
    folder = locate(args.model).absolute()  # a search may begin in another folder
    pretrained = load(folder, allow=args.allow)
    field_of(pretrained, args.modality)
    where = _absolute(args.source)
    source = open_source(where, args.modality == "text", args.column, args.key_column)
    manifest = Manifest(
        model=str(folder),
        model_digest=model_digest(folder),
        modality=args.modality,
        embed_dim=pretrained.model.embed_dim,
        source=where,
        column=args.column,
        key_column=args.key_column,
        digest=source.digest,
        samples=len(source),
        part_size=args.part_size,
        format=args.format,
        dtype=args.dtype,
    )
    store = Store.create(args.out, manifest, args.overwrite)
    job = Job(args.out, args.batch_size, args.workers, devices, args.allow)
    with _bar(manifest.samples, args.modality) as progress:
        embed(store, job, source, pretrained, progress)
    skipped = store.skipped()
    print(f"{manifest.samples - skipped} of {manifest.samples} embedded, {manifest.embed_dim} numbers each: {args.out}")
    if lost := len((args.out / LOST).read_text("utf-8").split("\n")) - 1 if (args.out / LOST).is_file() else 0:
        print(f"damage to the shards took samples besides: {lost} places, in {args.out / LOST}", file=sys.stderr)
    if skipped:
        print(f"{skipped} skipped, listed with the reason in {args.out}/*.skipped.jsonl", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmpretrain embed",
        description="Embed pictures or texts. Run again after an interruption, it goes on where it stopped.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder, a run folder, or what mmpretrain.load takes")
    add("source", metavar="SOURCE", help=f"a folder of pictures, shards, or a table ({', '.join(TABLES)})")
    add("out", type=Path, metavar="OUT", help="folder for the embeddings; made if missing")
    add(
        "--modality", choices=["image", "text"], default="image", help="what of the source is embedded (default: image)"
    )
    add("--format", choices=["parquet", "npy"], default="parquet", help="default: parquet")
    add("--dtype", choices=["float32", "float16"], default="float32", help="of the stored numbers (default: float32)")
    add("--column", metavar="NAME", help="of a table: default image, or caption for texts")
    add("--key-column", metavar="NAME", help="of a table: unique name of a row (default: its number)")
    add("--batch-size", type=int, default=256, metavar="N", help="default: 256")
    add("--part-size", type=int, default=8192, metavar="N", help="samples in a file (default: 8192)")
    add("--workers", type=int, default=1, metavar="N", help="processes that decode, for each device (default: 1)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--processes", type=int, metavar="N", help="GPUs, or processes on a CPU (default: all GPUs; one on a CPU)")
    add("--overwrite", action="store_true", help="remove the embeddings of another model or source in OUT")
    add("--allow", action="append", default=[], metavar="PACKAGE", help="a package of yours that the model is built of")
    return parser


def _absolute(source: str) -> str:
    """Write a local path or pattern in a way that means the same in every folder."""
    from mmpretrain.data.cache import scheme_of

    return source if scheme_of(source) or source.startswith("{") else str(Path(source).absolute())


def _devices(device: str | None, processes: int | None) -> list[str]:
    """Return one device for each process; raises `InputError` for one that is not there."""
    import torch

    from mmpretrain.device import usable

    gpus = torch.cuda.device_count()
    kind = device or ("cuda" if gpus else "cpu")
    if kind != "cuda":
        return [str(usable(kind))] * (processes or 1)
    wanted = max(1, gpus) if processes is None else processes
    if wanted > gpus:
        raise InputError(f"{wanted} GPUs are wanted and {gpus} are there; set --processes or --device cpu")
    return [f"cuda:{number}" for number in range(wanted)]


@contextmanager
def _bar(total: int, modality: str) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(f"{modality}s"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(modality, total=total)
        yield lambda count: bar.update(task, advance=count)
