"""CLIP_benchmark as a client: its own command line evaluates one of our models.

    python -m mmpretrain.interop.clip_benchmark eval --pretrained runs/x/model --dataset wds/mnist --dataset_root ...

is `clip_benchmark` with the model type `mmpretrain` added and chosen; every other option is CLIP_benchmark's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmpretrain.errors import EXIT_INPUT, InputError
from mmpretrain.pretrained import Pretrained

if TYPE_CHECKING:
    import torch

MODEL_TYPE = "mmpretrain"
MODEL_NAME = "mmpretrain"
"""What CLIP_benchmark writes as the name of the model: ours is known by its folder, which is `--pretrained`."""


def load(
    model_name: str = MODEL_NAME,
    pretrained: str = "",
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
) -> Pretrained:
    """Load a model folder, a run folder, or a checkpoint of a run as (model, transform, tokenizer).

    The folder is `pretrained`, or `model_name` where that is empty; `cache_dir` is not used. Pictures stay uint8, which
    the model normalises itself, and the tokenizer's `Padded` has the `.to(device)` that CLIP_benchmark calls.
    """
    from mmpretrain.evaluation.candidates import find

    found = find(pretrained or model_name)
    if len(found) != 1:
        raise InputError(
            f"{pretrained or model_name} is {len(found)} models; give one, or --pretrained_model with several"
        )
    return found[0].load(device)


def register() -> None:
    """Make `--model_type mmpretrain` known to CLIP_benchmark in this process; raises `InputError` without it."""
    try:
        from clip_benchmark import models
    except ImportError as error:
        raise InputError(f"clip-benchmark is needed: {error}; pip install 'mmpretrain-contrastive[eval]'") from error
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:  # the command line holds this very list
        models.MODEL_TYPES.append(MODEL_TYPE)
    _mend_accuracy()


def _mend_accuracy() -> None:
    """Replace the accuracy of clip-benchmark 1.6.2 where NumPy, from 2.4 on, no longer makes a number of an array."""
    import torch
    from clip_benchmark.metrics import linear_probe, zeroshot_classification

    try:
        zeroshot_classification.accuracy(torch.eye(2), torch.arange(2))
    except TypeError:
        zeroshot_classification.accuracy = linear_probe.accuracy = accuracy


def accuracy(output: torch.Tensor, target: torch.Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Share of rows of `output` (N,K) whose `target` (N,) is among the k highest, for each k of `topk`."""
    found = output.topk(max(topk), dim=1).indices == target.view(-1, 1)
    return [found[:, :k].any(dim=1).double().mean().item() for k in topk]


def main(argv: Sequence[str] | None = None) -> int:
    """Run CLIP_benchmark's command line with our model type; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["eval"]:
        if not any(given.startswith("--pretrained") for given in arguments) and not {"-h", "--help"} & set(arguments):
            print("mmpretrain: error: no model is given; add --pretrained FOLDER", file=sys.stderr)
            return EXIT_INPUT
        for option, value in (("--model_type", MODEL_TYPE), ("--model", MODEL_NAME)):
            if not any(given == option or given.startswith(f"{option}=") for given in arguments):
                arguments += [option, value]
    before = sys.argv
    sys.argv = ["clip_benchmark", *arguments]
    try:
        register()
        from clip_benchmark import cli

        status: Any = cli.main()
    except (InputError, OSError) as error:  # an OSError names its file: no such data set, most likely
        print(f"mmpretrain: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    finally:
        sys.argv = before
    return int(status or 0)


if __name__ == "__main__":
    sys.exit(main())
