"""`mmpretrain plan`: what a config would need and reach on given hardware."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn

from mmpretrain.activation_checkpointing import checkpoint_activations
from mmpretrain.config import instantiate
from mmpretrain.initial import follow
from mmpretrain.model import MultimodalModel
from mmpretrain.planning import arguments
from mmpretrain.planning.arguments import Precision
from mmpretrain.planning.hardware import Hardware
from mmpretrain.planning.loss_cost import loss_costs
from mmpretrain.planning.measure import ModelCost, measure
from mmpretrain.planning.numbers import number
from mmpretrain.planning.predict import (
    Input,
    Run,
    Times,
    largest_batch,
    largest_micro_batch,
    memory,
    messages,
    times,
)
from mmpretrain.planning.traffic import Message, Ranks
from mmpretrain.planning.weights import Weights, weigh
from mmpretrain.provenance import given_overrides


class Plan(NamedTuple):
    """A prediction; `notes` say what it leaves out."""

    run: Run
    rows: int
    feed: Input
    caption_tokens: int | None
    samples_seen: float
    memory: dict[str, float]
    largest: int
    suggestions: list[str]
    messages: list[Message]
    times: Times
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether the step fits in the memory of a device."""
        return sum(self.memory.values()) <= self.run.hardware.usable_bytes

    @property
    def bound(self) -> str:
        """What bounds the run."""
        return self.times.bound if self.fits else "memory"

    @property
    def global_batch(self) -> int:
        """Rows of all ranks."""
        return self.rows * self.run.ranks.all

    @property
    def samples_per_s(self) -> float:
        """Of all devices."""
        return self.global_batch / self.times.step

    @property
    def hours(self) -> float:
        """Wall-clock of the whole run."""
        return self.samples_seen / self.samples_per_s / 3600

    @property
    def useful(self) -> float:
        """FLOPs of one sample that the mathematics asks for: model and losses."""
        losses = self.run.losses(self.run.place(self.rows)).values()
        return self.run.model.useful + sum(cost.useful for cost in losses) / self.rows

    @property
    def mfu(self) -> float:
        """Useful FLOPs over the peak of the data sheet."""
        peak = self.run.hardware.peak_tflops if self.run.half else self.run.hardware.float32_tflops
        return self.useful * self.samples_per_s / self.run.ranks.all / (peak * 1e12)

    @property
    def reached(self) -> float:
        """Useful FLOPs over what large matrix products reach: the denominator of `benchmarks/`."""
        return self.mfu / self.run.hardware.attainable


def plan(config: DictConfig) -> Plan:
    """Plan what `config` (see configs/plan.yaml) describes; reads no data and needs no GPU.

    Raises `InputError` for hardware, devices or a batch that cannot be, and for a model that plan cannot measure.
    """
    follow(config, given_overrides())
    build = partial(instantiate, allow=tuple(config.allow_targets))
    described: Hardware = build(config.hardware)
    ranks = arguments.ranks(config, described)
    hardware, rows = described.shared(ranks.per_node), arguments.rows_of_one(config, ranks)
    feed, seen = arguments.feed(config), arguments.samples_seen(config)
    precision = arguments.precision(config, hardware)
    with torch.device("meta"):
        model = _model(config, build)
    shapes = arguments.shapes(config, model)
    run = _run(config, build, model, shapes, hardware, ranks, precision)
    parts = memory(run, rows)
    largest = largest_batch(run)
    made = Plan(
        run=run,
        rows=rows,
        feed=feed,
        caption_tokens=shapes["text"][0] if "text" in shapes else None,
        samples_seen=seen,
        memory=parts,
        largest=largest,
        suggestions=[],
        messages=messages(run, rows),
        times=times(run, rows, feed),
        notes=_notes(config, build, run, rows, precision),
    )
    return made if made.fits else made._replace(suggestions=suggest(config, build, made, shapes, precision))


def _model(config: DictConfig, build: Any) -> MultimodalModel:
    """Build what is trained: with the adapters of `finetune`, beside which the rest has no gradients."""
    model: MultimodalModel = build(config.model)
    if config.finetune.lora is not None:
        build(config.finetune.lora).attach(model)
    return model


def _run(
    config: DictConfig,
    build: Any,
    model: MultimodalModel,
    shapes: Mapping[str, tuple[int, ...]],
    hardware: Hardware,
    ranks: Ranks,
    precision: Precision,
) -> Run:
    from mmpretrain.train import STEP, training_module

    half = precision.autocast is not None
    parallel, view = arguments.parallel(config, ranks)
    size = config.trainer.get("micro_batch_size")
    if size is not None:
        number("trainer.micro_batch_size", size, 1, whole=True)
    # What train refuses is refused here; 8 bits ask for this host's GPU, which is not the one planned for.
    step = {key: config.trainer[key] for key in STEP if key in config.trainer and key != "fp8"}
    module = training_module(config, model, step, build)
    losses = {name: loss for name, loss in module.losses.items() if module.weights.get(name, 1.0)}
    cost = _measured(config, build, shapes, hardware, precision, step.get("activation_checkpointing"))
    weights: Weights = weigh(model, module.optimizer, module.groups)
    return Run(
        model=cost,
        weights=weights,
        losses=lambda place: loss_costs(losses, cost, place, half),
        hardware=hardware,
        ranks=ranks,
        parallel=parallel,
        bucket_view=view,
        half=half,
        micro_batch_size=size,
        averaged=arguments.averaged(config),
    )


def _measured(
    config: DictConfig,
    build: Any,
    shapes: Mapping[str, tuple[int, ...]],
    hardware: Hardware,
    precision: Precision,
    mode: Any,
) -> ModelCost:
    def recompute(model: nn.Module) -> None:
        checkpoint_activations(model, mode)

    return measure(
        lambda: _model(config, build),
        shapes,
        precision.autocast,
        hardware.kind == "gpu",  # on a CPU training takes plain attention
        None if mode is None else recompute,
    )


def suggest(
    config: DictConfig, build: Any, made: Plan, shapes: Mapping[str, tuple[int, ...]], precision: Precision
) -> list[str]:
    """What would make the step fit, each with its price; train refuses selective checkpointing of micro-batches."""
    found = []
    run, rows = made.run, made.rows
    mode_now = config.trainer.get("activation_checkpointing")
    size = largest_micro_batch(run, rows)
    if size and mode_now != "selective":
        slower = (run.model.useful + run.model.recomputed + run.model.forward) / (
            run.model.useful + run.model.recomputed
        )
        found.append(f"trainer.micro_batch_size={size}: fits, {slower:.2f}x the products")
    modes = () if mode_now is not None else ("full",) if run.micro_batch_size is not None else ("selective", "full")
    for mode in modes:
        changed = run._replace(model=_measured(config, build, shapes, run.hardware, precision, mode))
        slower = (changed.model.useful + changed.model.recomputed) / run.model.useful
        most = largest_batch(changed)
        verdict = "fits" if most >= rows else f"fits {most} a device"
        found.append(f"trainer.activation_checkpointing={mode}: {verdict}, {slower:.2f}x the products")
    if made.largest:
        found.append(f"data.global_batch_size={made.largest * run.ranks.all}: {made.largest} a device fit")
    return found


def _notes(config: DictConfig, build: Any, run: Run, rows: int, precision: Precision) -> list[str]:
    hardware = run.hardware
    share = f"Efficiency {hardware.efficiency:.0%} of what large products reach ({hardware.attainable:.0%} of the peak)"
    if hardware.kind == "gpu":
        notes = [f"A prediction. {share} is an assumption; give what you measured as hardware.efficiency."]
    else:
        notes = [
            f"A prediction. {share} is of one machine and one model ({hardware.source}); small models and other "
            "machines reach less or more. Give what you measured as hardware.efficiency.",
            "Input and compute share the cores, so their times add; ranks of a machine divide all it has.",
        ]
    if precision.replaced is not None:
        notes.append(
            f"trainer.precision was chosen after this host's CPU; for {hardware.name} it is taken as bf16-mixed, "
            "as trainer=gpu sets it."
        )
    unknown = [name for name, cost in run.losses(run.place(rows)).items() if not cost.known]
    if unknown:
        notes.append(f"Nothing is counted of the losses {', '.join(unknown)}, which are not of this library.")
    if config.finetune.remember:
        notes.append("Remembered embeddings of a frozen encoder are counted as computed, as in the first epoch.")
    if any(getattr(loss, "needs_original", False) for loss in build(config.losses)["losses"].values()):
        notes.append("The original model, which a loss compares with, is not counted.")
    if config.trainer.get("compile") is not None:
        notes.append("Compiled steps keep fewer activations than counted here.")
    if config.trainer.get("fp8"):
        notes.append("Products in 8 bits are not counted as faster.")
    return notes
