"""Between logged steps the host never asks the device for a number, so that it can run ahead of it."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from functools import partial
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from mmpretrain import ContrastiveLoss, PredictionLoss, SigmoidLoss
from mmpretrain.cli import HARMLESS
from mmpretrain.data.device_prefetch import DevicePrefetch
from mmpretrain.data.step import Step, Trace
from mmpretrain.losses.prediction import linear_cross_entropy
from mmpretrain.losses.sigmoid import sigmoid_sweep
from mmpretrain.losses.tiled_contrastive import contrastive_backward_sweep, contrastive_sweep
from mmpretrain.training.callbacks import Metrics
from mmpretrain.training.diagnostics import Diagnostics
from mmpretrain.training.ema import EMA
from mmpretrain.training.guard import NonFiniteGuard
from mmpretrain.training.module import TrainingModule
from mmpretrain.training.optim import parameter_groups, warmup_cosine
from mmpretrain.types import IGNORE_INDEX, Batch, Lengths
from tests import models
from tests.faults.bad_steps import EventFile, NoCheckpoints

FAMILIES = {
    "clip": (models.clip, {"contrastive": ContrastiveLoss()}),
    "siglip": (models.siglip, {"sigmoid": SigmoidLoss()}),
    "coca": (models.coca, {"contrastive": ContrastiveLoss(), "caption": PredictionLoss()}),
}
WAITS = (
    "_local_scalar_dense",  # item, float, bool, if
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
    "_linalg_svd",
)
"""Operators whose results' shape or value the host must know."""


class Waiting(TorchDispatchMode):
    """Counts the operators that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = [x for a in args if isinstance(a, (list, tuple)) for x in a if getattr(x, "dtype", None) == torch.bool]
        if name in WAITS or (name in ("index", "index_put", "index_put_") and masks):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Steps(Callback):
    """Cuts what was counted into steps: what a step's own code and that of all callbacks before this one ran."""

    def __init__(self, mode: Waiting) -> None:
        self.mode, self.steps = mode, list[dict[str, int]]()

    def on_train_batch_start(self, *args: Any) -> None:
        if not self.steps:  # what came before is the loader's start
            self.mode.found.clear()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append(dict(self.mode.found))
        self.mode.found.clear()


def trainer_and_module(
    family: str, folder: Any, extra: list[Callback], accelerator: str, **options: Any
) -> tuple[Any, Any]:
    build, losses = FAMILIES[family]
    optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    schedule = partial(warmup_cosine, total_steps=6, warmup_steps=2)
    module = TrainingModule(build(), losses, optimizer, parameter_groups, 0.1, schedule, **options)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)
    guard = NonFiniteGuard(EventFile(folder / "events.jsonl"), NoCheckpoints(), check_every_n_steps=3)
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed",
        max_steps=6,
        gradient_clip_val=1.0,
        callbacks=[Diagnostics(3), guard, EMA(0.9), Metrics(3), *extra],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return trainer, module


def collated(batch: Batch) -> Batch:
    """A batch with what the host knows of its lengths, as a tokenizer gives it."""
    lengths = Lengths(batch["text"].mask.sum(1).tolist())
    return {**batch, "text": batch["text"]._replace(lengths=lengths)}


class Data(lightning.LightningDataModule):
    """Six steps of six rows."""

    global_batch_size = 6

    def train_dataloader(self) -> DevicePrefetch:
        trace = Trace({"image_text": ["a"]}, {"image_text": []})
        steps = [Step({"image_text": collated(models.batch(6, seed, pad_to=12))}, trace) for seed in range(6)]
        loader = torch.utils.data.DataLoader(steps, batch_size=None, pin_memory=torch.cuda.is_available())
        return DevicePrefetch(loader, self.trainer.strategy.root_device)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_operator_of_a_step_makes_the_host_wait(family, options, tmp_path):
    mode = Waiting()
    steps = Steps(mode)
    trainer, module = trainer_and_module(family, tmp_path, [steps], "cpu", **options)
    with mode:
        trainer.fit(module, Data())
    assert [found for number, found in enumerate(steps.steps, start=1) if number % 3] == [{}] * 4
    assert all(steps.steps[2::3])  # logged steps do wait, so the operators are counted


Given = tuple[Any, ...]
"""Arguments of an operator: no mode looks into those of this package, so what is inside of them is run by itself."""


def contrastive(identities: bool, ring: bool) -> list[tuple[Any, Given]]:
    """Both sweeps, the second with what the first gives."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 4, generator=generator)
    ids = torch.tensor([0, 1, 2, 0, 3, 1, 4]) if identities else None
    inputs = a, b, torch.tensor([5.0]), ids
    sums = contrastive_sweep(*inputs, 0, 3, ring)[1:]
    return [
        (contrastive_sweep, (*inputs, 0, 3, ring)),
        (contrastive_backward_sweep, (torch.tensor(2.0), *inputs, *sums, 0, 3, ring)),
    ]


def sigmoid(ring: bool) -> list[tuple[Any, Given]]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 4, generator=generator)
    return [(sigmoid_sweep, (a, b, torch.tensor([5.0]), torch.tensor([-5.0]), 0, 3, ring))]


def caption(precision: torch.dtype, learns: bool) -> list[tuple[Any, Given]]:
    """All rows, as on a GPU, where choosing those that are asked would wait for how many they are."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 4, generator=generator), torch.randn(9, 4, generator=generator)
    labels = torch.tensor([1, 2, IGNORE_INDEX, 4, 5, IGNORE_INDEX, 8])
    return [(linear_cross_entropy, (hidden, weight, labels, precision, 3, False, learns))]


CALLS = [
    *(call for identities in (False, True) for ring in (False, True) for call in contrastive(identities, ring)),
    *(call for ring in (False, True) for call in sigmoid(ring)),
    *(call for dtype in (torch.float32, torch.bfloat16) for learns in (False, True) for call in caption(dtype, learns)),
]


@pytest.mark.parametrize(("operator", "given"), CALLS, ids=[call[0]._name for call in CALLS])
def test_nothing_inside_an_operator_of_a_loss_makes_the_host_wait(operator, given):
    mode = Waiting()
    with mode:
        found = operator._init_fn(*given)  # the function that was made an operator
    assert not mode.found
    for mine, theirs in zip(found, operator(*given), strict=True):
        assert torch.equal(mine, theirs)


def test_no_operator_is_left_out():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mmpretrain::")}
    assert {f"mmpretrain::{call[0]._name}" for call in CALLS} == names


def test_the_watch_sees_the_choice_of_rows_that_a_cpu_makes():
    [(operator, given)] = caption(torch.float32, True)
    mode = Waiting()
    with mode:
        operator._init_fn(*given[:5], True, True)
    assert mode.found["nonzero"] == 1


def learnt(kind: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A loss made by its operator, with its backward pass still to run."""
    calls = {
        "contrastive": contrastive(True, False),
        "sigmoid": sigmoid(False),
        "caption": caption(torch.float32, True),
    }
    operator, given = calls[kind][0]
    learns = [x.requires_grad_() for x in given[: 2 if kind == "caption" else 3]]
    return operator(*given)[0], learns


@pytest.mark.parametrize("kind", ["contrastive", "sigmoid", "caption"])
def test_no_backward_pass_of_an_operator_makes_the_host_wait(kind):
    loss, learns = learnt(kind)
    mode = Waiting()
    with mode:
        loss.backward()
    assert not mode.found and all(x.grad is not None for x in learns)


class Refused(Callback):
    """Makes waiting for the GPU an error, except in the first step, which sets things up, and in logged ones."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        quiet = trainer.global_step > 0 and (trainer.global_step + 1) % 3
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")

    def on_train_batch_end(self, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_waits_for_the_gpu(family, options, tmp_path):
    trainer, module = trainer_and_module(family, tmp_path, [Refused()], "gpu", **options)
    try:
        trainer.fit(module, Data())
    finally:
        torch.cuda.set_sync_debug_mode("default")
