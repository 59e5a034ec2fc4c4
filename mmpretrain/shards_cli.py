"""`mmpretrain shards`: make shards from pictures and captions, look into them; `shards_check` holds the rest."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmpretrain.data.manifest import SKIPPED, Done
from mmpretrain.data.shards import Shard, expand
from mmpretrain.data.sources import TABLES, Item, list_classes, list_folder, list_table
from mmpretrain.data.write import Written, write_shards
from mmpretrain.errors import InputError
from mmpretrain.shards_check import add_parsers, check, human_bytes, index, plain, printable

_SHOWN = 5  # captions that `list` prints


def main(argv: Sequence[str]) -> int:
    """Run `mmpretrain shards ARGV` and return the exit status: 0, 1 where a check finds faults, 2 on wrong input."""
    args = _parser().parse_args(argv)
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "write": _write,
        "list": _list,
        "check": check,
        "index": index,
    }
    try:
        return commands[args.command](args)
    except InputError as error:
        print(f"mmpretrain: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; finished shards are kept, run the same command again to go on" if args.command == "write" else ""
        print(f"stopped{kept}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmpretrain shards", description="Make shards and look into them.")
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser(
        "write",
        help="make shards from a folder of pictures or a table",
        description="Make shards (tar files of pictures and captions) from a folder of pictures with x.txt "
        "or x.json beside x.jpg, from one folder per class (--classes), or from a .csv, .tsv, .jsonl or "
        ".parquet table. Run again after an interruption, it goes on where it stopped.",
    )
    add = write.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder or table")
    add("out", type=Path, metavar="OUT", help="folder for the shards; made if missing")
    add("--classes", action="store_true", help="the first folder's name is caption and class")
    add("--image-column", metavar="NAME", help="picture path or, in parquet, bytes (default: image)")
    add(
        "--caption-column",
        metavar="NAME",
        action="append",
        help="caption; repeat for several (default: caption)",
    )
    add("--key-column", metavar="NAME", help="unique name of a row (default: its number)")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per core)",
    )
    add("--prefix", default="", help="what shard names begin with (default: nothing)")
    add("--overwrite", action="store_true", help="remove the shards that an earlier run made in OUT")
    show = commands.add_parser("list", help="print shards, samples, fields, sizes and a few captions")
    show.add_argument("path", metavar="PATH", help="a shard, a pattern such as 'data/{000..009}.tar', or a folder")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    add_parsers(commands)
    return parser


def _write(args: argparse.Namespace) -> int:
    items, options, classes = _items(args)
    with _progress(len(items), args.samples_per_shard) as progress:
        written = write_shards(
            items,
            args.out,
            options,
            samples_per_shard=args.samples_per_shard,
            workers=args.workers,
            prefix=args.prefix,
            overwrite=args.overwrite,
            progress=progress,
        )
    if classes is not None:
        text = json.dumps(classes, ensure_ascii=False, indent=1) + "\n"
        try:
            (args.out / "classes.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{args.out / 'classes.json'} cannot be written: {error.strerror}") from error
    _print_summary(args.out, args.prefix, written)
    return 0


def _items(args: argparse.Namespace) -> tuple[list[Item], dict[str, Any], list[str] | None]:
    """Return the items of the source, the options that made them, and the class names if it has classes."""
    source: Path = args.source
    table_options = [args.image_column, args.caption_column, args.key_column]
    if source.is_dir():
        if any(option is not None for option in table_options):
            raise InputError(f"{source} is a folder; --image-column, --caption-column and --key-column need a table")
        if args.classes:
            items, classes = list_classes(source)
            return items, {"classes": True}, classes
        return list_folder(source), {"classes": False}, None
    if not source.is_file() or source.suffix.lower() not in TABLES:
        what = "does not exist" if not source.exists() else "is no table"
        raise InputError(f"{source} {what}; expected a folder of pictures or a {', '.join(TABLES)} file")
    if args.classes:
        raise InputError(f"{source} is a table; --classes needs a folder with one folder per class")
    image, captions = args.image_column or "image", args.caption_column or ["caption"]
    options = {"image_column": image, "caption_column": captions, "key_column": args.key_column}
    return list_table(source, image, captions, args.key_column), options, None


@contextmanager
def _progress(total: int, per_shard: int) -> Iterator[Callable[[Done, bool], None]]:
    """Show a bar on stderr if that is a terminal; kept shards count at once."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("pictures", total=total)
        # A kept shard's skips are not read again: it counts as what was written.
        yield lambda done, kept: bar.update(task, advance=done.samples + len(done.skipped))
        bar.update(task, completed=total)


def _print_summary(out: Path, prefix: str, written: Written) -> None:
    count = len(written.shards)
    names = written.shards[0] if count == 1 else f"{prefix}{{{0:05}..{count - 1:05}}}.tar"
    gaps = written.shards != [f"{prefix}{i:05}.tar" for i in range(count)]  # parts without one readable picture
    shards = out if gaps and count > 1 else out / names
    print(f"{written.samples} samples in {count} shard{'s' * (count != 1)}: {shards}")
    if written.skipped:
        pictures = "picture" if written.skipped == 1 else "pictures"
        print(f"{written.skipped} {pictures} skipped, listed with the reason in {out / SKIPPED}")
    print(f"train on them: mmpretrain train experiment=image_text_clip {_override(str(shards))}")


def _override(shards: str) -> str:
    """Return `data.train=...` quoted for the shell and, inside, for Hydra, to which a bare brace is a
    dictionary."""
    override = "data.train='{}'".format(shards.replace("\\", "\\\\").replace("'", "\\'"))
    return shlex.quote(override) if set(override) & set('"$`\\!') else f'"{override}"'


def _list(args: argparse.Namespace) -> int:
    counts: dict[str, int] = {}
    fields, sizes, captions = Counter[str](), Counter[str](), list[dict[str, str]]()
    for name in expand(args.path):
        shard = Shard(name)
        counts[name] = len(shard)
        for i, key in enumerate(shard.keys):
            of_sample = shard.sizes(i)
            fields.update(of_sample.keys())
            sizes.update(of_sample)
            if len(captions) < _SHOWN:
                captions += _captions(key, shard.read(i))
    about = {
        "shards": [{"path": name, "samples": count} for name, count in counts.items()],
        "samples": sum(counts.values()),
        "fields": {name: {"samples": fields[name], "bytes": sizes[name]} for name in sorted(fields)},
        "captions": captions,
    }
    if args.json:
        print(json.dumps(plain(about)))
        return 0
    for name, count in counts.items():
        print(printable(f"{name}: {count} samples"))
    print(f"{about['samples']} samples in {len(counts)} shard{'s' * (len(counts) != 1)}")
    for name in sorted(fields):
        print(printable(f"  {name}: {fields[name]} samples, {human_bytes(sizes[name])}"))
    for caption in captions:
        print(printable(f"  {caption['key']}: {caption['text']}"))
    return 0


def _captions(key: str, sample: dict[str, bytes]) -> list[dict[str, str]]:
    """Return the text fields of a sample as one printable line each, cut to 100 characters."""
    lines = []
    for field in ("txt", "json"):
        if field in sample:
            text = " ".join(sample[field][:1000].decode("utf-8", "replace").split())
            text = printable(text)
            lines.append({"key": key, "text": text if len(text) <= 100 else text[:99] + "…"})
    return lines[:1]
