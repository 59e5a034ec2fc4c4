"""Lightning's side of checkpoints: when to save, in the background, and what a failed save means."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import CheckpointIO

from mmpretrain.distributed import any_rank, barrier, rank
from mmpretrain.errors import InputError, LimitReached
from mmpretrain.training.checkpoint import load, newest, save
from mmpretrain.training.folder import linked, mark_best, step_of
from mmpretrain.training.snapshot import Snapshot
from mmpretrain.training.state_json import Packed, pack
from mmpretrain.training.watchdog import paused


class SafeCheckpointIO(CheckpointIO):
    """Writes Lightning's checkpoints by `mmpretrain.training.checkpoint`, and reads them; for `Trainer(plugins=[...])`.

    Where `asynchronous`, the training thread only copies the tensors to memory of the CPU (pinned, for a GPU; the
    memory is kept for the next save); one background thread does the rest. At most one save is under way: the next
    one waits for it. A save that the system refuses (`OSError`: disk full, quota, I/O error) raises nothing: it is
    printed to stderr and counted in `failures`, which a successful save sets back to 0.
    """

    def __init__(self, keep: int = 2, asynchronous: bool = True) -> None:
        self.keep, self.asynchronous = keep, asynchronous
        self.failures = 0
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []
        self._snapshot = Snapshot()
        self.writer: Callable[[Path, Packed, int, int], object] = save

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint of the step `checkpoint["global_step"]` into the folder of `path`."""
        self.wait()  # its copies are written over
        packed = pack(checkpoint)
        if self.asynchronous:
            packed = packed._replace(tensors=self._snapshot.take(packed.tensors))
        step = int(checkpoint["global_step"])
        self._run(f"step {step}", partial(self.writer, Path(path).parent, packed, step, self.keep))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint on the CPU; raises `DamagedCheckpoint`."""
        self.wait()
        return load(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        shutil.rmtree(path)

    def teardown(self) -> None:
        """Finish what is under way and end the thread."""
        self.wait()
        self._snapshot = Snapshot()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def mark_best(self, folder: Path, step: int, monitor: str, value: float) -> None:
        """Point `best` at the checkpoint of `step`, after it was written, if it was."""
        self._run(f"the best value, step {step},", partial(mark_best, folder, step, monitor, value))

    def _run(self, what: str, job: Callable[[], object]) -> None:
        """Run a job after those that were given before: in the background, or here and now."""

        def guarded() -> None:
            try:
                if job() is not None:
                    self.failures = 0
            except OSError as error:
                self.failures += 1
                where = f" in {error.filename}" if error.filename else ""
                print(
                    f"checkpoint of {what} was not saved: {error.strerror or error}{where} (failure {self.failures} in "
                    "a row); training goes on",
                    file=sys.stderr,
                    flush=True,
                )

        if not self.asynchronous:
            guarded()
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._jobs.append(self._pool.submit(guarded))

    def wait(self) -> None:
        """Wait until everything is written; raises what a background job raised, but for failed saves."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()


class Checkpoints(Callback):
    """Saves every `every_n_steps` (0: only there) and at the last step, into `folder`; it stands before `Evaluation`.

    `keep` newest are kept, and the best one where `KeepBest` names it. Give `io` to the trainer's plugins. Raises
    `LimitReached`, on every rank and at the next save, after `max_failures` failed saves in a row.
    """

    def __init__(
        self, folder: Path, every_n_steps: int, keep: int = 2, asynchronous: bool = True, max_failures: int = 3
    ) -> None:
        if every_n_steps < 0 or keep < 1 or max_failures < 1:
            raise InputError(
                f"callbacks.checkpoint_every_n_steps={every_n_steps}, checkpoints kept {keep}, failures allowed "
                f"{max_failures}; give at least 0, 1 and 1"
            )
        self.folder, self.every_n_steps, self.max_failures = folder, every_n_steps, max_failures
        self.io = SafeCheckpointIO(keep, asynchronous)
        self.last: int | None = None
        self.stop_saved = True  # whether the step at which a signal stopped the run is safe on the disk

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Do not save again what training goes on from."""
        states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
        pack({"callbacks": states})  # what cannot be saved is said now and on every rank, not at the first save
        there = linked(self.folder, "latest")
        same = there is not None and there.exists() and step_of(there) == trainer.global_step
        self.last = trainer.global_step if any_rank(same and rank() == 0) else None

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Save where it is time, the last step included."""
        step = trainer.global_step
        if step == trainer.max_steps:
            self.save(trainer)
        elif self.every_n_steps > 0 and step % self.every_n_steps == 0:
            skipped = getattr(module, "skipped", None)  # on the device: read only where a save is due
            # Only after a good step, so that going back leads out of a row of bad ones.
            if skipped is None or not skipped.item():
                self.save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save where a signal stopped the run, and wait for the last one."""
        with paused(trainer, "saving"):
            if trainer.should_stop:
                self.stop_saved = self.save_now(trainer)
            self.io.wait()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Wait for the last one."""
        with paused(trainer, "saving"):
            self.io.wait()

    def save(self, trainer: Trainer) -> None:
        """Save this step, in the background if asynchronous; every rank must call it. Raises `LimitReached`."""
        if trainer.global_step == self.last:
            return
        with paused(trainer, "saving"):
            self.io.wait()
            if any_rank(self.io.failures >= self.max_failures):
                raise LimitReached(
                    f"{self.max_failures} checkpoints in a row could not be saved into {self.folder}; free space "
                    "there, then go on from the last good one with resume=auto"
                )
            self._save(trainer)

    def save_now(self, trainer: Trainer) -> bool:
        """Save this step and wait for it, on every rank; returns whether it is safe on the disk."""
        with paused(trainer, "saving"):
            self.io.wait()
            if trainer.global_step != self.last or any_rank(self.io.failures > 0):
                self._save(trainer)
                self.io.wait()
            return not any_rank(self.io.failures > 0)

    def wait(self) -> None:
        """Wait until what was saved lies on the disk, or has failed."""
        self.io.wait()

    def restore(self, trainer: Trainer) -> int | None:
        """Load model, optimizers and callbacks' states of the last good checkpoint on every rank; step and data go on.

        Returns the step it is of, None where there is no checkpoint.
        """
        with paused(trainer, "saving"):
            return self._restore(trainer)

    def _restore(self, trainer: Trainer) -> int | None:
        self.io.wait()
        barrier()
        path: Path | None = trainer.strategy.broadcast(newest(self.folder).path if rank() == 0 else None)
        if path is None:
            return None
        checkpoint = trainer.strategy.load_checkpoint(path)
        trainer.strategy.load_model_state_dict(checkpoint, strict=True)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        for optimizer, lrs in zip(trainer.optimizers, rates, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr  # the schedule goes on
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback.state_key in checkpoint["callbacks"]:
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
        barrier()
        return step_of(path)

    def _save(self, trainer: Trainer) -> None:
        self.last = trainer.global_step
        trainer.save_checkpoint(self.folder / f"step_{trainer.global_step:08d}")
