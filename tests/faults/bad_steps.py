"""NaN and infinity in one rank's loss, gradient, pixels or embeddings at random steps, against the run without them.

    python -m tests.faults.bad_steps [--trials N] [--seed S]

Each trial trains a small CLIP in float64 on one rank or two, poisons one rank at random steps, and compares weights,
optimizer state, buffers and moving average bit for bit with the run whose data lack those steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Collection, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import timm.optim
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from mmpretrain import ContrastiveLoss, Padded
from mmpretrain.cli import HARMLESS
from mmpretrain.data.step import Step, Trace
from mmpretrain.distributed import rank, world_size
from mmpretrain.training.ema import EMA
from mmpretrain.training.fsdp import shard
from mmpretrain.training.guard import NonFiniteGuard
from mmpretrain.training.module import TrainingModule
from mmpretrain.training.optim import muon_groups, parameter_groups
from mmpretrain.training.saving import Checkpoints
from tests import models
from tests.ranks import run_ranks

KINDS = ("loss", "gradient", "pixel", "embedding")
OPTIMIZERS = {
    "adamw": (partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1), parameter_groups),
    "adamw_fused": (partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True), parameter_groups),
    "sgd": (partial(torch.optim.SGD, lr=1e-2, momentum=0.9), parameter_groups),
    "muon": (partial(timm.optim.Muon, lr=1e-2), muon_groups),
}
ROWS = 6


class Poison(Callback):
    """Puts NaN or infinity into one rank at the given steps (the first is 1), in one of the `KINDS` of places.

    `loss`: infinite, with finite gradients. `gradient`: one number, after the ranks averaged theirs.
    """

    def __init__(self, kind: str, steps: Collection[int], rank: int = 0) -> None:
        assert kind in KINDS, kind
        self.kind, self.steps, self.rank = kind, frozenset(steps), rank

    def _due(self, trainer: Trainer) -> bool:
        return rank() == self.rank and trainer.global_step + 1 in self.steps

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Place the hooks."""
        if self.kind == "loss":
            module.losses = {
                name: lambda outputs, loss=loss: loss(outputs) + (torch.inf if self._due(trainer) else 0.0)
                for name, loss in module.losses.items()
            }
        elif self.kind == "pixel":

            def spoil(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
                if not self._due(trainer):
                    return None
                values = given[0].clone()
                values[0, 0, 0, 0] = torch.nan
                return (values, *given[1:])

            module.model.encoders["image"].register_forward_pre_hook(spoil)
        elif self.kind == "embedding":
            module.model.projections["text"].register_forward_hook(
                lambda _, given, out: out * torch.inf if self._due(trainer) else None
            )

    def on_after_backward(self, trainer: Trainer, module: Any) -> None:
        """Spoil one number of one gradient."""
        if self.kind == "gradient" and self._due(trainer):
            parameter = module.model.encoders["text"].token_embedding.weight
            gradient = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
            gradient.view(-1)[3] = torch.nan


class EventFile:
    """Events as lines of JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, step: int, event: dict[str, Any]) -> None:
        """Append one event."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **event}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Every event."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


class NoCheckpoints(Callback):
    """Where nothing was saved."""

    def restore(self, trainer: Trainer) -> int | None:
        """Find nothing."""
        return None


def data(count: int) -> list[Step]:
    """`count` steps of this rank's rows in float64; each step and rank has its own."""
    found = []
    for number in range(count):
        batch = models.batch(ROWS, seed=1 + number * world_size() + rank(), pad_to=12)
        pixels = Padded(batch["image"].values.double() / 255)
        ids = [f"shard.tar:{number}-{rank()}-{row}" for row in range(ROWS)]
        found.append(Step({"image_text": {**batch, "image": pixels}}, Trace({"image_text": ids}, {"image_text": []})))
    return found


def fit(
    steps: Sequence[Step],
    folder: Path,
    optimizer: str = "adamw",
    callbacks: Sequence[Callback] = (),
    model: nn.Module | None = None,
    accelerator: str = "cpu",
    **guard: Any,
) -> tuple[dict[str, Tensor], TrainingModule]:
    """Train on `steps` with guard and moving average; returns everything that training changes, and the module."""
    make, groups = OPTIMIZERS[optimizer]
    model = models.clip() if model is None else model
    module = TrainingModule(model.double(), {"contrastive": ContrastiveLoss()}, make, groups, 0.1)
    checkpoints = guard.pop("checkpoints", None) or NoCheckpoints()
    average = EMA(0.9)
    own = NonFiniteGuard(EventFile(folder / "data_events.jsonl"), checkpoints, **guard)
    if world_size() > 1:
        os.environ |= {"TORCHELASTIC_RUN_ID": "faults", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(world_size())}
        os.environ |= {"RANK": str(rank()), "LOCAL_RANK": str(rank()), "WORLD_SIZE": str(world_size())}
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=world_size(),
        strategy="ddp" if world_size() > 1 else "auto",
        precision="64-true",
        max_steps=len(steps),
        gradient_clip_val=1.0,
        callbacks=[*callbacks, own, average, checkpoints],
        plugins=[checkpoints.io] if isinstance(checkpoints, Checkpoints) else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(list(steps), batch_size=None))
    state = {f"model/{name}": value.clone() for name, value in module.model.state_dict().items()}
    state |= {f"average/{name}": value.clone() for name, value in average.average.items()}
    state["updates"] = average.updates.clone()
    for index, slots in trainer.optimizers[0].state_dict()["state"].items():
        state |= {f"optimizer/{index}/{k}": v.clone() for k, v in slots.items() if isinstance(v, Tensor)}
    return state, module


def differing(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[str]:
    """Names of what is not equal bit for bit."""
    both = got.keys() & want.keys()
    return sorted((got.keys() ^ want.keys()) | {name for name in both if not torch.equal(got[name], want[name])})


def compare(kind: str, optimizer: str, bad: Collection[int], poisoned: int, count: int) -> list[str]:
    """Train with and without the bad steps on the ranks that are up; returns what differs, in words."""
    steps = data(count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        poison = Poison(kind, bad, poisoned)
        got, _ = fit(steps, folder, optimizer, [poison], rollback_after=count + 1, check_every_n_steps=4)
        events = EventFile(folder / "data_events.jsonl").read()
    with tempfile.TemporaryDirectory() as name:
        want, _ = fit([s for i, s in enumerate(steps, start=1) if i not in bad], Path(name), optimizer)
    wrong = differing(got, want)
    if rank() == 0:
        ids = {
            number: [f"shard.tar:{number - 1}-{r}-{row}" for r in range(world_size()) for row in range(ROWS)]
            for number in sorted(bad)
        }
        if {event["step"]: event["ids"] for event in events} != ids:
            wrong.append("events")
    return wrong


def compare_sharded(poisoned: int, count: int = 5) -> list[str]:
    """The same with FSDP2, the spoilt number lying in one rank's shard; returns what differs."""
    bad = {2, 4}
    with tempfile.TemporaryDirectory() as name:
        got = _sharded(data(count), bad, poisoned, Path(name))
        want = _sharded(
            [step for i, step in enumerate(data(count), start=1) if i not in bad], set(), poisoned, Path(name)
        )
    return differing(got, want)


def _sharded(steps: Sequence[Step], bad: Collection[int], poisoned: int, folder: Path) -> dict[str, Tensor]:
    """Lightning has FSDP2 on GPUs only: its order of hooks, by hand."""
    model = models.clip().double()
    shard(model, init_device_mesh("cpu", (world_size(),)))
    make, groups = OPTIMIZERS["adamw_fused"]
    optimizer = make(groups(model, 0.1))
    guard = NonFiniteGuard(EventFile(folder / "data_events.jsonl"), NoCheckpoints())
    poison, losses = Poison("gradient", bad, poisoned), ContrastiveLoss()
    module = SimpleNamespace(model=model, history={}, skipped=None)
    trainer: Any = SimpleNamespace(global_step=0, max_steps=len(steps), precision_plugin=None)
    guard.on_train_start(trainer, module)
    for number, step in enumerate(steps):
        trainer.global_step = number
        guard.on_train_batch_start(trainer, module, step, number)
        loss = losses(model(step.batches["image_text"]))
        module.history["loss/total"] = loss.detach()
        optimizer.zero_grad()
        loss.backward()
        poison.on_after_backward(trainer, module)
        guard.on_before_optimizer_step(trainer, module, optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        trainer.global_step += 1
        guard.on_train_batch_end(trainer, module, None, step, number)
    return {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials and print a table; returns 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    generator, failed = random.Random(options.seed), 0
    counts: dict[tuple[str, int], list[int]] = {}
    for trial in range(options.trials):
        kind, ranks = KINDS[trial % len(KINDS)], 1 + (trial // len(KINDS)) % 2
        optimizer, count = generator.choice(sorted(OPTIMIZERS)), generator.randint(5, 12)
        bad = frozenset(generator.sample(range(1, count + 1), generator.randint(1, count - 2)))
        arguments = (kind, optimizer, bad, generator.randrange(ranks), count)
        wrong = compare(*arguments) if ranks == 1 else [*chain(*run_ranks(compare, ranks, *arguments))]
        row = counts.setdefault((kind, ranks), [0, 0, 0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + len(bad), row[2] + (not wrong)
        if wrong:
            failed += 1
            print(f"trial {trial}: {arguments} on {ranks} ranks differs in {wrong[:5]}", file=sys.stderr)
    print(f"{'poisoned':<10} {'ranks':>5} {'runs':>5} {'bad steps':>9} {'equal bit for bit':>17}")
    for (kind, ranks), (runs, steps, equal) in sorted(counts.items()):
        print(f"{kind:<10} {ranks:>5} {runs:>5} {steps:>9} {equal:>17}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
