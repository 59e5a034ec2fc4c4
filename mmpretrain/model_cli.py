"""`mmpretrain card` and `mmpretrain push`: a model folder's identity card, and its way to the hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def card(argv: Sequence[str]) -> int:
    """Run `mmpretrain card ARGV`: write the card of a model folder, or compare it again; returns the exit status."""
    from mmpretrain.pretrained import identify, model_folder, read_config, recheck

    parser = argparse.ArgumentParser(
        prog="mmpretrain card",
        description="Write the identity card of a model folder: what it is and computes now, which every load "
        "compares. Folders that mmpretrain saved have one already; write it anew after a change you mean.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder, or the run folder that holds one")
    parser.add_argument("--check", action="store_true", help="only compare the folder with its card, hashes and all")
    parser.add_argument("--source", metavar="TEXT", help="what the model was made of (default: as before)")
    _add_allow(parser)
    args = parser.parse_args(argv)
    folder = model_folder(args.model)
    config = read_config(folder)
    if args.check:
        found = recheck(folder, config, args.allow)
        print(f"{folder} {'is what its identity card says' if found else 'has no identity card'}")
        return 0 if found else 1
    identify(folder, config, args.source, args.allow)
    print(f"written to {folder / 'identity.json'}")
    return 0


def push(argv: Sequence[str]) -> int:
    """Run `mmpretrain push ARGV`: a model folder to the hub; returns the exit status."""
    from mmpretrain import hub
    from mmpretrain.hub_card import model_card
    from mmpretrain.pretrained import model_folder

    parser = argparse.ArgumentParser(
        prog="mmpretrain push",
        description="Push a model to the Hugging Face hub, with a model card. Log in first with `hf auth login`, or "
        "set HF_TOKEN. The folder is verified before anything is sent.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder, or the run folder that holds one")
    parser.add_argument("repository", metavar="ORG/NAME", help="made if it is not there")
    parser.add_argument("--licence", metavar="ID", help="identifier of the hub's, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--message", default="Upload a model with mmpretrain", metavar="TEXT", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="print the model card and send nothing")
    _add_allow(parser)
    args = parser.parse_args(argv)
    if args.dry_run:
        hub.check_names(args.repository, args.licence)
        print(model_card(model_folder(args.model), args.repository, args.licence))
        return 0
    print(hub.push(args.model, args.repository, args.licence, args.private, args.message, args.allow))
    return 0


def _add_allow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow", action="append", default=[], metavar="PACKAGE", help="package of yours whose classes the model has"
    )
