"""What a config asks `mmpretrain plan` for, refused where `mmpretrain train` would refuse it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from mmpretrain.config import check_target
from mmpretrain.errors import InputError
from mmpretrain.model import MultimodalModel
from mmpretrain.planning.hardware import Hardware
from mmpretrain.planning.numbers import number
from mmpretrain.planning.predict import Input, Parallel
from mmpretrain.planning.traffic import Ranks

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None, "32": None}


class Precision(NamedTuple):
    """The dtype of autocast, None for none; `replaced` is a precision of this host's CPU that says nothing here."""

    autocast: torch.dtype | None
    replaced: str | None


def precision(config: DictConfig, hardware: Hardware) -> Precision:
    """Read `trainer.precision`: one chosen after this host's CPU is taken as bf16-mixed for a GPU."""
    given = config.trainer.precision
    if given not in AUTOCAST:
        raise InputError(f"trainer.precision is {given!r}; plan knows {', '.join(AUTOCAST)}")
    elsewhere = hardware.kind == "gpu" and config.trainer.get("accelerator") == "cpu"
    if elsewhere and OmegaConf.is_interpolation(config.trainer, "precision"):
        return Precision(torch.bfloat16, given)
    return Precision(AUTOCAST[given], None)


def ranks(config: DictConfig, hardware: Hardware) -> Ranks:
    """Read `trainer.devices` and `trainer.num_nodes`."""
    devices, nodes = config.trainer.devices, config.trainer.get("num_nodes", 1)
    if devices in ("auto", -1):
        devices = hardware.devices_per_node
    number("trainer.devices", devices, 1, whole=True)
    number("trainer.num_nodes", nodes, 1, whole=True)
    if hardware.kind == "gpu" and devices > hardware.devices_per_node:
        raise InputError(
            f"trainer.devices={devices}, but a node of hardware={hardware.name} has {hardware.devices_per_node}; "
            f"set trainer=ddp trainer.devices={hardware.devices_per_node} and more trainer.num_nodes"
        )
    return Ranks(devices, nodes, gloo=hardware.kind == "cpu")


def rows_of_one(config: DictConfig, ranks: Ranks) -> int:
    """Divide `data.global_batch_size` by the ranks."""
    batch = config.data.global_batch_size
    number("data.global_batch_size", batch, 1, whole=True)
    rows, left = divmod(batch, ranks.all)
    if left or rows < 1:
        raise InputError(
            f"data.global_batch_size {batch} cannot be divided by {ranks.all} devices; set it to a multiple, such as "
            f"{max(1, rows) * ranks.all}"
        )
    return int(rows)


def averaged(config: DictConfig) -> bool:
    """Whether a moving average of the weights is kept."""
    decay = config.callbacks.ema.decay
    if decay is None:
        return False
    from mmpretrain.training.ema import EMA

    EMA(number("callbacks.ema.decay", decay, 0))  # refuses 1 and more
    return True


def parallel(config: DictConfig, ranks: Ranks) -> tuple[Parallel, bool]:
    """How ranks share the work, and whether DDP keeps gradients in its buckets."""
    strategy = config.trainer.get("strategy", "auto")
    target = strategy.get("_target_") if OmegaConf.is_dict(strategy) else None
    if target is not None:
        check_target(target, "trainer.strategy._target_", tuple(config.allow_targets))
        from lightning.pytorch.strategies import ModelParallelStrategy

        if issubclass(get_object(target), ModelParallelStrategy):
            if averaged(config):
                raise InputError(
                    "callbacks.ema averages whole weights, these are sharded (FSDP2); set callbacks.ema.decay=null or "
                    "trainer=ddp"
                )
            return ("fsdp" if ranks.per_node > 1 else "ddp" if ranks.all > 1 else "none"), True
    # The DDP that Lightning makes of its own accord has gradients and buckets apart.
    view = target is not None and bool(strategy.get("gradient_as_bucket_view", False))
    return ("ddp" if ranks.all > 1 else "none"), view


def feed(config: DictConfig) -> Input:
    """Read what feeds a device."""
    wanted = config.plan
    return Input(*(float(number(f"plan.{name}", wanted[name])) for name in ("images_per_core", "bytes_per_sample")))


def samples_seen(config: DictConfig) -> float:
    """Samples of the whole run."""
    if config.plan.samples_seen is not None:
        return float(number("plan.samples_seen", config.plan.samples_seen))
    return float(config.data.global_batch_size * number("trainer.max_steps", config.trainer.max_steps, 1, whole=True))


def shapes(config: DictConfig, model: MultimodalModel) -> dict[str, tuple[int, ...]]:
    """The shape of one row of each modality; text has the mean length, unless its encoder computes padding."""
    tokens = number("plan.caption_tokens", config.plan.caption_tokens, 2)  # start and end
    if not isinstance(config.plan.padded, bool):
        raise InputError(f"plan.padded is {config.plan.padded!r}; give true or false")
    known: dict[str, tuple[int, ...]] = {"image": (3, config.data.image_size, config.data.image_size)}
    if "text" in model.encoders:
        context = int(config.tokenizer.context_length)
        whole = config.plan.padded or getattr(model.encoders["text"], "reads_padding", False)
        if tokens > context:
            raise InputError(f"plan.caption_tokens is {tokens}, but the tokenizer cuts at {context}; give at most that")
        known["text"] = (context if whole else round(tokens),)
    for modality, shape in config.plan.shapes.items():
        if not OmegaConf.is_list(shape) or not shape:
            raise InputError(f"plan.shapes.{modality} is {shape!r}; give the shape of one row, such as [16,80]")
        known[modality] = tuple(int(number(f"plan.shapes.{modality}", size, 1, whole=True)) for size in shape)
    missing = [modality for modality in model.encoders if modality not in known]
    if missing:
        raise InputError(f"plan does not know the shape of {missing}; set plan.shapes.{missing[0]}=[...] of one row")
    return {modality: known[modality] for modality in model.encoders}
