"""The `mmpretrain` command: `train`, `evaluate`, `plan`, `shards`; glue only."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from mmpretrain.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_PREEMPTED,
    EXIT_STOPPED,
    InputError,
    LimitReached,
    Preempted,
    RunFailed,
)

USAGE = """usage: mmpretrain COMMAND ...

  mmpretrain train [key=value ...]                        train (without arguments: a demo of a few minutes)
  mmpretrain evaluate checkpoint=PATH [key=value ...]     evaluate saved models: zero-shot, on a benchmark
  mmpretrain plan [key=value ...]                         predict memory, speed and GPU hours of a training
  mmpretrain shards write SOURCE OUT | list PATH          make shards, or see what is in them
  mmpretrain shards check PATH... | index PATH...         find what is wrong with them, or index them
  mmpretrain reproduce RUN                                run a run again and compare
  mmpretrain diff RUN1 RUN2                               what differs between two runs
  mmpretrain interpolate A B OUT --alpha 0.5              a model between two of the same architecture
  mmpretrain forgetting BEFORE AFTER --old METRIC         what fine-tuning gained, and what it cost
  mmpretrain convert SOURCE OUT                           weights of open_clip, OpenAI, transformers, into a folder
  mmpretrain export FORMAT MODEL OUT                      a model for open_clip, transformers, timm, ONNX, torch
  mmpretrain embed MODEL SOURCE OUT                       embeddings of a folder, a table or shards, as files
  mmpretrain search INDEX TEXT                            what of them is nearest to a text or a picture
  mmpretrain card MODEL                                   write or check what a model must still be when loaded
  mmpretrain push MODEL ORG/NAME                          a model and its model card to the Hugging Face hub

`mmpretrain COMMAND --help` says more."""

PROGRAMS = {
    "shards": ("mmpretrain.shards_cli", "main"),
    "reproduce": ("mmpretrain.reproduce", "main"),
    "diff": ("mmpretrain.diff", "main"),
    "interpolate": ("mmpretrain.interpolation", "main"),
    "forgetting": ("mmpretrain.forgetting", "main"),
    "convert": ("mmpretrain.convert_cli", "main"),
    "export": ("mmpretrain.export_cli", "main"),
    "embed": ("mmpretrain.embed_cli", "main"),
    "search": ("mmpretrain.search_cli", "main"),
    "card": ("mmpretrain.model_cli", "card"),
    "push": ("mmpretrain.model_cli", "push"),
}
"""Commands with arguments of their own: where the function is that takes them. It is imported when it is called."""

BRACES = re.compile(r"^([^='\"]+)=((?!\{\w+:)[^='\"\[]*\{\d+\.\.\d+\}[^'\"\]]*)$")
"""An override whose value has a numeric brace range and no quotes of its own."""

HARMLESS = (
    ".*LeafSpec.*",  # Lightning's use of a renamed torch class
    "Checkpoint directory .* exists and is not empty",  # a resumed run
    ".*does not have many workers",  # decided in the config
    ".*your dataloader is not resumable",  # ours begins at the step it is resumed from
    "Found .* in eval mode at the start of training",  # frozen encoders
)
"""Warnings of libraries that a user can do nothing about."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (see `mmpretrain.errors`), 130 where Ctrl-C had nothing to save."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    composed = {"train": _train, "evaluate": _evaluate, "plan": _plan}
    commands = [*composed, *PROGRAMS]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from mmpretrain import __version__

        print(__version__)
        return 0
    if arguments[0] not in commands:
        close = difflib.get_close_matches(arguments[0], commands, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return _fail(f"no command {arguments[0]!r}{hint} (commands: {', '.join(commands)})")
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)
    try:
        if arguments[0] in composed:
            return composed[arguments[0]](arguments[1:])
        module, function = PROGRAMS[arguments[0]]
        return int(getattr(importlib.import_module(module), function)(arguments[1:]))
    except (InputError, OSError) as error:  # an OSError names its file: missing, unreadable, full disk
        return _fail(str(error))
    except Preempted as stop:
        return _fail(str(stop), EXIT_PREEMPTED)
    except LimitReached as stop:
        return _fail(str(stop), EXIT_STOPPED)
    except RunFailed as failure:
        return _fail(str(failure), EXIT_FAILED)
    except KeyboardInterrupt:
        return 130


def _fail(message: str, status: int = EXIT_INPUT) -> int:
    if message.startswith("Caught "):  # a loader's worker sends its traceback; its last line is the message
        message = message.strip().splitlines()[-1].partition(": ")[2]
    kind = "" if status == EXIT_PREEMPTED else "error: "
    print(f"mmpretrain: {kind}{message}", file=sys.stderr)
    return status


def _train(arguments: list[str]) -> int:
    def job(config: Any) -> None:
        from mmpretrain.evaluation.console import show
        from mmpretrain.runs import rank_zero
        from mmpretrain.train import train

        metrics = train(config)
        if rank_zero():
            show(metrics)

    return _hydra("train", job, arguments)


def _evaluate(arguments: list[str]) -> int:
    def job(config: Any) -> None:
        from mmpretrain.evaluate import evaluate

        evaluate(config)

    return _hydra("evaluate", job, arguments)


def _plan(arguments: list[str]) -> int:
    def job(config: Any) -> None:
        from mmpretrain.planning.plan import plan
        from mmpretrain.planning.show import show

        show(plan(config), config.json)

    return _hydra("plan", job, arguments)


def _hydra(name: str, job: Callable[[Any], None], arguments: list[str]) -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from mmpretrain.composition import check_given, explain, register_resolvers

    composition = (HydraException, OmegaConfBaseException)
    register_resolvers()
    original = list(sys.argv)
    failures: list[BaseException] = []
    named = "MMPRETRAIN_RUN_ID" in os.environ
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"

    @hydra.main(config_path="pkg://mmpretrain.configs", config_name=name, version_base="1.3")
    def run(config: Any) -> None:
        # Lightning starts further local ranks with this process's own command line, so it must be whole again.
        sys.argv = original
        if any(isinstance(failure, (Preempted, KeyboardInterrupt)) for failure in failures):
            return  # a signal ends a sweep, not only the job it came in
        try:
            job(config)
        except (InputError, Preempted, LimitReached, RunFailed, OSError, KeyboardInterrupt, *composition) as error:
            failures.append(error)  # raised below: Hydra would print lines of its own, and end a sweep

    # Hydra would print its errors over many lines and exit; raised, they can be said in one.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [original[0], *shell_friendly(arguments)]
    try:
        check_given(name, sys.argv[1:])
        run()
        for failure in failures[:-1]:  # of a sweep; the last one is said below
            print(f"mmpretrain: error: {failure}", file=sys.stderr)
        if failures:
            raise failures[-1]
    except composition as error:
        if traceback_wanted:
            raise
        raise InputError(explain(error, name, arguments)) from error
    finally:
        sys.argv = original
        if not named:
            os.environ.pop("MMPRETRAIN_RUN_ID", None)  # made for this run and its further ranks
        if not traceback_wanted:
            del os.environ["HYDRA_FULL_ERROR"]
    return EXIT_DONE


def shell_friendly(arguments: Sequence[str]) -> list[str]:
    """Let `data.train=/path/{000..009}.tar` and `-m` anywhere mean what they say; Hydra's grammar has neither."""
    multirun = [a for a in arguments if a in ("-m", "--multirun")]
    rest = [a for a in arguments if a not in multirun]
    return [*multirun, *(BRACES.sub(r"\1='\2'", a) for a in rest)]
