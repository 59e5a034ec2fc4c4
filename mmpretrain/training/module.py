"""The LightningModule: batches -> outputs -> weighted losses -> optimizer, nothing else."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from mmpretrain.activation_checkpointing import Checkpointing, checkpoint_activations
from mmpretrain.data.datamodule import Step
from mmpretrain.distributed import rank
from mmpretrain.errors import InputError
from mmpretrain.model import MultimodalModel
from mmpretrain.training.compilation import GRAPHS, check_compile, compile_model
from mmpretrain.training.cpu import prepare_cpu
from mmpretrain.training.float8 import check_float8, convert_to_float8
from mmpretrain.training.fsdp import shard
from mmpretrain.training.micro_batches import forward_in_micro_batches
from mmpretrain.training.remembered import remembers
from mmpretrain.types import Batch, Loss, Outputs

MAX_LOGIT_SCALE = 100.0


def seed_everything_for(seed: int, step: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators from seed, step and rank alone.

    So dropout, patch dropout and whatever a user's loss draws are the same after a resume, and no state of a generator
    has to be saved; ranks draw different numbers.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest()
    number = int.from_bytes(digest, "little")
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 (the global generator is what a user's code may draw from)
    torch.manual_seed(number)


class TrainingModule(lightning.LightningModule):
    """Trains a `MultimodalModel` on `{source: Batch}` with a weighted sum of losses.

    `losses`: name -> loss; `weights`: name -> weight (1 where absent; a loss of weight 0 is not computed).
    `optimizer`: parameter groups -> optimizer; `groups`: (model, weight_decay) -> parameter groups.
    `scheduler`: optimizer -> scheduler, stepped once for each optimizer step. After each step the logit scale is
    clamped to [1, 100] (Radford et al. 2021, section 2.5), never inside the forward pass. `micro_batch_size` bounds
    the rows whose activations are held at once, without changing any gradient. `seed` decides, with
    step and rank, what patch dropout draws. `compile` (a mode of torch.compile), `activation_checkpointing` and `fp8`
    make the step faster or smaller, see docs/speed.md; of these only `fp8` is an approximation.
    """

    def __init__(
        self,
        model: MultimodalModel,
        losses: Mapping[str, Loss],
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        groups: Callable[[nn.Module, float], list[dict[str, Any]]],
        weight_decay: float = 0.0,
        scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        weights: Mapping[str, float] | None = None,
        micro_batch_size: int | None = None,
        seed: int = 0,
        compile: str | None = None,
        activation_checkpointing: Checkpointing | None = None,
        fp8: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.losses, self.weights = model, dict(losses), dict(weights or {})
        self.optimizer, self.groups, self.weight_decay, self.scheduler = (
            optimizer,
            groups,
            weight_decay,
            scheduler,
        )
        unknown = set(self.weights) - set(self.losses)
        if unknown or not self.losses:
            raise InputError(f"weights name {sorted(unknown)}; the losses are {sorted(self.losses)}")
        groups(model, weight_decay)  # its checks, and the schedule's, should speak now, not after the data is ready
        if scheduler is not None:
            scheduler(torch.optim.SGD([torch.zeros(1)], lr=1.0))
        if micro_batch_size is not None and micro_batch_size < 1:
            raise InputError(
                f"trainer.micro_batch_size is {micro_batch_size}; give at least 1, or null for the whole batch"
            )
        if micro_batch_size is not None and any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()
        ):
            raise InputError("batch norm would see each micro-batch alone; set trainer.micro_batch_size=null")
        self.micro_batch_size, self.seed, self.compile_mode = micro_batch_size, seed, compile
        if compile is not None:
            check_compile(compile, micro_batch_size)
        if fp8:
            check_float8(compile is not None)
            convert_to_float8(model)
        if activation_checkpointing is not None:
            if activation_checkpointing == "selective" and micro_batch_size is not None:
                raise InputError(
                    "trainer.activation_checkpointing=selective would keep for every micro-batch what those are there "
                    "to forget; set it to full or null"
                )
            checkpoint_activations(model, activation_checkpointing)
        self.history: dict[str, Tensor] = {}
        self.embeddings: dict[str, dict[str, Tensor]] = {}
        self.skipped: Tensor | None = None  # (), on the device: 1 where NonFiniteGuard skipped the last step, else 0
        self._original: tuple[MultimodalModel, ...] = ()  # in a tuple: no part of this module, so not trained nor saved

    def preserve(self, original: MultimodalModel | None) -> None:
        """Show the losses that ask for it, as `outputs.original`, what `original` makes of each batch; never saved.

        It is frozen. Raises `InputError` where a loss asks for it and there is none.
        """
        asking = [name for name, loss in self.losses.items() if getattr(loss, "needs_original", False)]
        if asking and original is None:
            raise InputError(f"loss {asking[0]!r} compares with the original model; begin with a whole one: init=MODEL")
        if asking and original is not None:
            self._original = (original.requires_grad_(False).eval(),)

    def forward(self, batch: Batch) -> Outputs:
        """Run the model on one source's batch, in micro-batches where they are set."""
        if self.micro_batch_size is None:
            outputs: Outputs = self.model(batch)
            return outputs
        return forward_in_micro_batches(self.model, batch, self.micro_batch_size)

    def training_step(self, step: Step, batch_index: int) -> Tensor:
        """Sum the weighted losses of every source."""
        seed_everything_for(self.seed, self.global_step, rank())
        if self.compile_mode in GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        total = torch.zeros((), device=self.device)
        self.history, self.embeddings = {}, {}
        for source, batch in step.batches.items():
            outputs = self.forward(batch)
            for original in self._original:
                outputs = outputs._replace(original=self._of(original, batch))
            self.embeddings[source] = {m: e.detach() for m, e in outputs.embeddings.items()}
            for name, loss in self.losses.items():
                weight = self.weights.get(name, 1.0)
                if weight:
                    value = loss(outputs)
                    if value.numel() != 1:
                        raise InputError(f"loss {name!r} gives a tensor {tuple(value.shape)}; expected one number")
                    value = value.reshape(())
                    total = total + weight * value
                    self.history[f"loss/{name}"] = self.history.get(f"loss/{name}", 0) + value.detach()
            self.history["logit_scale"] = outputs.logit_scale.detach()
            if outputs.logit_bias is not None:
                self.history["logit_bias"] = outputs.logit_bias.detach()
        self.history["loss/total"] = total.detach()
        return total

    @torch.no_grad()
    def _of(self, original: MultimodalModel, batch: Batch) -> Outputs:
        if self.micro_batch_size is None:
            outputs: Outputs = original(batch)
            return outputs
        return forward_in_micro_batches(original, batch, self.micro_batch_size)

    def configure_model(self) -> None:
        """Compile the model, then shard it where the strategy has a device mesh (FSDP2)."""
        if (self.compile_mode is not None or self.device_mesh is not None) and remembers(self.model):
            raise InputError(
                "finetune.remember computes rows one by one, each rank others: not under trainer=fsdp or "
                "trainer.compile; set finetune.remember=false"
            )
        if self.compile_mode is not None:
            several = self.trainer.world_size > 1 or self.device_mesh is not None
            compile_model(self.model, self.compile_mode, several, any_size=self.micro_batch_size is not None)
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh, half=self.trainer.precision == "bf16-mixed")

    def on_fit_start(self) -> None:
        """Prepare for the device."""
        for original in self._original:
            original.to(self.device)
        if self.device.type == "cpu":
            for model in (self.model, *self._original):
                prepare_cpu(model, self.trainer.num_devices)

    def configure_optimizers(self) -> Any:
        """Build optimizer and scheduler; the number of steps comes from the config, never from the trainer."""
        optimizer = self.optimizer(self.groups(self.model, self.weight_decay))
        for group in optimizer.param_groups:  # before the schedule takes it for the rate at its peak
            group["lr"] *= group.get("lr_scale", 1.0)
        # Fused kernels could take gradient scales away themselves, and Lightning refuses to clip beside them. Ours get
        # gradients without a scale, before clipping.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"},
        }

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then clamp the logit scale, unless it is frozen: a model may have come with a larger one."""
        super().optimizer_step(*args, **kwargs)
        if self.model.logit_scale.requires_grad:
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
