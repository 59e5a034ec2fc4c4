"""Bad steps: a non-finite loss or gradient on any rank skips the step on every rank, leaving nothing of it behind."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmpretrain.distributed import gather_objects, rank, sum_over_ranks
from mmpretrain.errors import InputError, LimitReached

CAUSE = "non-finite loss or gradient"
_SHOWN = 5  # sample ids in a message


class EventLog(Protocol):
    """Where bad steps are written down."""

    def note(self, step: int, event: dict[str, Any]) -> None:
        """Write one event of a step; called on rank 0 alone."""


class Checkpoints(Protocol):
    """What goes back to the last good checkpoint."""

    def restore(self, trainer: Trainer) -> int | None:
        """Load weights, optimizer and callbacks' states on every rank; return its step, None where there is none."""


class _Seen(NamedTuple):
    """A step whose flag the host has not read yet; `ids` are this rank's samples by source."""

    step: int
    ids: dict[str, list[str]]
    flag: Tensor


class NonFiniteGuard(Callback):
    """Skips bad steps, logs their samples, rolls back after `rollback_after` in a row, stops beyond `budget` in all.

    After the backward pass one flag says whether the loss or a gradient of any rank is not finite (a gradient whose
    norm overflows counts too); ranks agree on it by one all-reduce of two numbers. A skipped step changes no
    parameter, no optimizer state and no buffer (batch norm's averages); the learning rate's schedule goes on.

    The device keeps the flags; the host reads them every `check_every_n_steps` steps, so rolling back and stopping
    come up to that many steps late. It reads them at every multiple of one of `saves` too: give the intervals of
    checkpoints, put this callback before the one that saves, and call `flush` before any other save. Fused Adam and
    AdamW skip on the device; for other optimizers the host reads each step's flag before it steps. A gradient scaler's
    overflows (float16) are skipped but not counted.

    Raises `LimitReached` on every rank beyond the budget, and where there is no checkpoint to go back to.
    """

    def __init__(
        self,
        events: EventLog,
        checkpoints: Checkpoints,
        rollback_after: int = 10,
        budget: int = 100,
        check_every_n_steps: int = 10,
        saves: Sequence[int] = (),
    ) -> None:
        if rollback_after < 1 or check_every_n_steps < 1 or budget < 0:
            raise InputError(
                f"callbacks.bad_steps has rollback_after={rollback_after}, budget={budget}, check_every_n_steps="
                f"{check_every_n_steps}; expected at least 1, 0 and 1"
            )
        self.events, self.checkpoints = events, checkpoints
        self.rollback_after, self.budget = rollback_after, budget
        self.intervals = [n for n in (check_every_n_steps, *saves) if n > 0]
        self.total = self.in_a_row = 0
        self._pending: list[_Seen] = []
        self._buffers: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._ids: dict[str, list[str]] = {}
        self._last = ""

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Find the buffers that are part of the model's state."""
        state = set(module.model.state_dict())
        self._buffers = [buffer for name, buffer in module.model.named_buffers() if name in state]

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        """Keep what the forward pass may change, and whose samples they are."""
        self._ids = batch.trace.ids
        self._saved = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Agree on whether this step is bad, and make the optimizer skip it if so."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        loss = module.history["loss/total"]
        norm = torch.nn.utils.get_total_norm(_local(p.grad for p in parameters)).to(loss.device)
        bad = sum_over_ranks(torch.stack([~torch.isfinite(loss), ~torch.isfinite(norm)]).float()) > 0
        skipped = bad.any().float()
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._pending.append(_Seen(trainer.global_step + 1, self._ids, bad[0].float() if scaled else skipped))
        module.skipped = skipped
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(torch.where(skipped > 0, saved, buffer))
        if skips_on_device(optimizer):
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
        elif skipped.item():
            for parameter in parameters:
                parameter.grad = None  # torch's and timm's optimizers leave such parameters and their state alone

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Read the flags where it is time, and act on them."""
        step = trainer.global_step
        if step != trainer.max_steps and all(step % interval for interval in self.intervals):
            return
        self.flush()
        if self.total > self.budget:
            raise LimitReached(
                f"{self.total} of {step} steps had a {CAUSE}, more than the budget of {self.budget}; {self._last}; "
                "all of them are in data_events.jsonl. Lower optimizer.lr, set trainer.gradient_clip_val=1.0 or "
                "trainer.precision=32-true, or leave these samples out; callbacks.bad_steps.budget allows more"
            )
        if self.in_a_row >= self.rollback_after:
            self._roll_back(trainer)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        """Write down what has not been read yet."""
        self.flush()

    def flush(self) -> None:
        """Read the flags and write the bad steps down; every rank must call it."""
        if not self._pending:
            return
        seen, self._pending = self._pending, []
        flags = torch.stack([one.flag for one in seen]).tolist()
        self.total, self.in_a_row = self._counts(flags)
        for one in (one for one, flag in zip(seen, flags, strict=True) if flag):
            ranks = gather_objects(one.ids)  # the flag is the same on every rank, so all of them come here
            ids = [name for source in one.ids for part in ranks for name in part[source]]
            shown = ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
            self._last = f"the last, step {one.step}, had the samples {shown}"
            if rank() == 0:
                self.events.note(one.step, {"cause": CAUSE, "ids": ids})

    def _counts(self, flags: Sequence[float]) -> tuple[int, int]:
        total, in_a_row = self.total, self.in_a_row
        for flag in flags:
            total += flag > 0
            in_a_row = in_a_row + 1 if flag else 0
        return total, in_a_row

    def _roll_back(self, trainer: Trainer) -> None:
        total, in_a_row = self.total, self.in_a_row
        step = self.checkpoints.restore(trainer)
        if step is None:
            raise LimitReached(
                f"{in_a_row} steps in a row had a {CAUSE} and there is no checkpoint to go back to; {self._last}. "
                "Lower optimizer.lr, raise scheduler.warmup_steps, or set callbacks.checkpoint_every_n_steps lower"
            )
        self.total, self.in_a_row = total, 0  # the budget is the run's: going back gives none of it back
        if rank() == 0:
            print(
                f"step {trainer.global_step}: {in_a_row} steps in a row had a {CAUSE}; weights and optimizer are those "
                f"of step {step} again ({total} of {self.budget} bad steps spent)",
                file=sys.stderr,
            )

    def state_dict(self) -> dict[str, Any]:
        """Both counts, with the steps that are not read yet."""
        flags = torch.stack([one.flag for one in self._pending]).tolist() if self._pending else []
        total, in_a_row = self._counts(flags)
        return {"total": total, "in_a_row": in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from `state_dict`."""
        self.total, self.in_a_row, self._pending = int(state_dict["total"]), int(state_dict["in_a_row"]), []


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether the optimizer's kernel can skip a step by itself, by `found_inf` (torch's fused Adam and AdamW).

    Fused SGD takes it too, but would keep a momentum that was never written where the first step is skipped.
    """
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and all(
        bool(group.get("fused")) for group in optimizer.param_groups
    )


def _local(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    """This rank's part of each gradient; the ranks' flags are joined later."""
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None]
