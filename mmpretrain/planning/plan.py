"""`mmpretrain plan`: what a config would need and reach on given hardware."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mmpretrain.activation_checkpointing import checkpoint_activations
from mmpretrain.config import check_target, instantiate
from mmpretrain.errors import InputError
from mmpretrain.model import MultimodalModel
from mmpretrain.planning.hardware import Hardware
from mmpretrain.planning.loss_cost import loss_costs
from mmpretrain.planning.measure import ModelCost, measure
from mmpretrain.planning.predict import (
    Input,
    Parallel,
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

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None, "32": None}


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


def plan(config: DictConfig) -> Plan:
    """Plan what `config` (see configs/plan.yaml) describes; reads no data and needs no GPU.

    Raises `InputError` for hardware, devices or a batch that cannot be, and for a model that plan cannot measure.
    """
    build = partial(instantiate, allow=tuple(config.allow_targets))
    hardware: Hardware = build(config.hardware)
    ranks = _ranks(config, hardware)
    rows, left = divmod(config.data.global_batch_size, ranks.all)
    if left or rows < 1:
        raise InputError(
            f"data.global_batch_size {config.data.global_batch_size} cannot be divided by {ranks.all} devices; set "
            f"it to a multiple, such as {max(1, rows) * ranks.all}"
        )
    wanted = config.plan
    for name in ("caption_tokens", "images_per_core", "bytes_per_sample"):
        if not wanted[name] > 0:
            raise InputError(f"plan.{name} is {wanted[name]}; give a number above 0")
    if config.trainer.precision not in AUTOCAST:
        raise InputError(f"trainer.precision is {config.trainer.precision!r}; plan knows {', '.join(AUTOCAST)}")
    with torch.device("meta"):
        model: MultimodalModel = build(config.model)
    shapes = _shapes(config, model)
    run = _run(config, build, model, shapes, hardware, ranks)
    feed = Input(float(wanted.images_per_core), float(wanted.bytes_per_sample))
    parts = memory(run, rows)
    largest = largest_batch(run)
    made = Plan(
        run=run,
        rows=rows,
        feed=feed,
        caption_tokens=shapes["text"][0] if "text" in shapes else None,
        samples_seen=float(wanted.samples_seen or config.data.global_batch_size * config.trainer.max_steps),
        memory=parts,
        largest=largest,
        suggestions=[],
        messages=messages(run, rows),
        times=times(run, rows, feed),
        notes=_notes(config, run, rows),
    )
    return made if made.fits else made._replace(suggestions=_suggestions(config, build, made, shapes))


def _ranks(config: DictConfig, hardware: Hardware) -> Ranks:
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    if devices in ("auto", -1):
        devices = hardware.devices_per_node
    if not isinstance(devices, int) or not isinstance(nodes, int) or devices < 1 or nodes < 1:
        raise InputError(f"trainer.devices={devices} and trainer.num_nodes={nodes}; plan takes numbers of at least 1")
    if hardware.kind == "gpu" and devices > hardware.devices_per_node:
        raise InputError(
            f"trainer.devices={devices}, but a node of hardware={hardware.name} has {hardware.devices_per_node}; "
            f"set trainer.devices={hardware.devices_per_node} and more trainer.num_nodes"
        )
    return Ranks(devices, nodes, gloo=hardware.kind == "cpu")


def _parallel(config: DictConfig, ranks: Ranks) -> tuple[Parallel, bool]:
    """How ranks share the work, and whether DDP keeps gradients in its buckets."""
    strategy = config.trainer.strategy
    target = strategy.get("_target_") if OmegaConf.is_dict(strategy) else None
    if target is not None:
        check_target(target, "trainer.strategy._target_", tuple(config.allow_targets))
        from lightning.pytorch.strategies import ModelParallelStrategy

        if issubclass(get_object(target), ModelParallelStrategy):
            return ("fsdp" if ranks.per_node > 1 else "ddp" if ranks.all > 1 else "none"), True
    view = target is None or bool(strategy.get("gradient_as_bucket_view", False))
    return ("ddp" if ranks.all > 1 else "none"), view


def _shapes(config: DictConfig, model: MultimodalModel) -> dict[str, tuple[int, ...]]:
    """The shape of one row of each modality; text has the mean length, unless its encoder computes padding."""
    known: dict[str, tuple[int, ...]] = {"image": (3, config.data.image_size, config.data.image_size)}
    if "text" in model.encoders:
        text = model.encoders["text"]
        context = int(config.tokenizer.context_length)
        whole = config.plan.padded or getattr(text, "reads_padding", False)
        if config.plan.caption_tokens > context:
            raise InputError(
                f"plan.caption_tokens is {config.plan.caption_tokens}, but the tokenizer cuts at {context}; "
                "give at most that"
            )
        known["text"] = (context if whole else round(config.plan.caption_tokens),)
    known |= {modality: tuple(shape) for modality, shape in config.plan.shapes.items()}
    missing = [modality for modality in model.encoders if modality not in known]
    if missing:
        raise InputError(f"plan does not know the shape of {missing}; set plan.shapes.{missing[0]}=[...] of one row")
    return {modality: known[modality] for modality in model.encoders}


def _run(
    config: DictConfig,
    build: Any,
    model: MultimodalModel,
    shapes: Mapping[str, tuple[int, ...]],
    hardware: Hardware,
    ranks: Ranks,
) -> Run:
    step, half = config.trainer, AUTOCAST[config.trainer.precision] is not None
    size = step.get("micro_batch_size")
    if size is not None and size < 1:
        raise InputError(f"trainer.micro_batch_size is {size}; give at least 1, or null for the whole batch")
    described = build(config.losses)
    losses = {name: loss for name, loss in described["losses"].items() if described["weights"].get(name, 1.0)}
    cost = _measured(config, build, shapes, hardware, step.get("activation_checkpointing"))
    optimizer = build(config.optimizer)
    weights: Weights = weigh(model, optimizer["optimizer"], optimizer["groups"])
    parallel, view = _parallel(config, ranks)
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
    )


def _measured(
    config: DictConfig, build: Any, shapes: Mapping[str, tuple[int, ...]], hardware: Hardware, mode: Any
) -> ModelCost:
    def recompute(model: nn.Module) -> None:
        checkpoint_activations(model, mode)

    return measure(
        lambda: build(config.model),
        shapes,
        AUTOCAST[config.trainer.precision],
        hardware.kind == "gpu",  # on a CPU training takes plain attention
        None if mode is None else recompute,
    )


def _suggestions(config: DictConfig, build: Any, made: Plan, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What would make the step fit, each with its price."""
    found = []
    run, rows = made.run, made.rows
    size = largest_micro_batch(run, rows)
    if size:
        slower = (run.model.useful + run.model.recomputed + run.model.forward) / (
            run.model.useful + run.model.recomputed
        )
        found.append(f"trainer.micro_batch_size={size}: fits, {slower:.2f}x the products")
    for mode in ("selective", "full") if config.trainer.get("activation_checkpointing") is None else ():
        changed = run._replace(model=_measured(config, build, shapes, run.hardware, mode))
        slower = (changed.model.useful + changed.model.recomputed) / run.model.useful
        most = largest_batch(changed)
        verdict = "fits" if most >= rows else f"fits {most} a device"
        found.append(f"trainer.activation_checkpointing={mode}: {verdict}, {slower:.2f}x the products")
    if made.largest:
        found.append(f"data.global_batch_size={made.largest * run.ranks.all}: {made.largest} a device fit")
    return found


def _notes(config: DictConfig, run: Run, rows: int) -> list[str]:
    notes = [
        f"A prediction. Efficiency {run.hardware.efficiency:.0%} of what large products reach "
        f"({run.hardware.attainable:.0%} of the peak) is an assumption; give what you measured as hardware.efficiency.",
    ]
    unknown = [name for name, cost in run.losses(run.place(rows)).items() if not cost.known]
    if unknown:
        notes.append(f"Nothing is counted of the losses {', '.join(unknown)}, which are not of this library.")
    if config.trainer.get("compile") is not None:
        notes.append("Compiled steps keep fewer activations than counted here.")
    if config.trainer.get("fp8"):
        notes.append("Products in 8 bits are not counted as faster.")
    return notes
