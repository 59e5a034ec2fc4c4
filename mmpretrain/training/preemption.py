"""Signals: SIGTERM, SIGUSR1 or Ctrl-C on any one rank stops all ranks at the same step, from where a run can go on.

A handler only sets a flag, because a checkpoint or a collective inside a handler would meet a half-finished step. The
ranks agree on the flag at step boundaries (`mmpretrain.distributed.Agreement`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mmpretrain.distributed import Agreement, barrier, is_distributed
from mmpretrain.errors import EXIT_PREEMPTED
from mmpretrain.training.watchdog import paused

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_INTERRUPTED = 130
SECOND_PRESS = 1.0
"""Seconds after which another SIGINT is a second press of Ctrl-C; launchers repeat the first one sooner."""


class Preemption(Callback):
    """Stops training at a step that all ranks agree on, once any of them got SIGTERM, SIGUSR1 or SIGINT.

    `install` it before anything is built: until another rank depends on this process a signal ends it at once, with
    the exit status of a preempted run. `signalled`: this rank got a signal. `stopped_at`: the step at which all ranks
    stopped, None while none has asked for it; the caller then saves a checkpoint. A second Ctrl-C ends the process at
    once, the last checkpoint stays.
    """

    def __init__(self) -> None:
        self.signalled = False
        self.stopped_at: int | None = None
        self._started = False
        self._first_press: float | None = None
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}
        self._agreement: Agreement | None = None

    def install(self) -> None:
        """Take over the three signals; outside of the main thread, where Python allows no handlers, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            before = signal.signal(number, self._note)
            if before != self._note:
                self._previous.setdefault(number, before)

    def restore(self) -> None:
        """Give the signals back to whoever had them before `install`."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Keep Lightning's own handlers out.

        Its SIGTERM handler broadcasts on whichever rank was signalled, which freezes the others; its SLURM handler
        saves in the middle of a step; and its epoch loop asks rank 0 before each step, waiting for the device.
        """
        connector: Any = trainer._signal_connector
        connector.register_signal_handlers = _nothing
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = _nothing

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """From here on a signal waits for a step boundary."""
        self.install()
        self._agreement = Agreement()
        self._started = True

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Vote, and stop here if a rank wanted to at the last boundary; at the last step, wait for the answer."""
        assert self._agreement is not None
        vote = self._agreement.now if trainer.global_step >= trainer.max_steps > 0 else self._agreement.at_step
        if self.stopped_at is None and vote(self.signalled):
            self.stopped_at = trainer.global_step
            trainer.should_stop = True
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = None, None  # not before some step

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Count a signal that came after the last vote, in the final evaluation."""
        assert self._agreement is not None
        with paused(trainer, "waiting for the other ranks to end"):
            if self.stopped_at is None and self._agreement.now(self.signalled):
                self.stopped_at = trainer.global_step
        self._agreement.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked process that has no handlers of its own yet
            return
        now, name = time.monotonic(), signal.Signals(number).name
        if number == signal.SIGINT:
            if self._first_press is not None and now - self._first_press > SECOND_PRESS:
                _say("ended at once; the last checkpoint stays")
                os._exit(EXIT_INTERRUPTED)
            self._first_press = now if self._first_press is None else self._first_press
        first, self.signalled = not self.signalled, True
        if self._alone():
            _say(f"{name}: ended before training began")
            raise SystemExit(EXIT_PREEMPTED)
        if first:
            _say(f"{name}: stopping after a step, with a checkpoint")

    def _alone(self) -> bool:
        """Say whether this process can end now: training has not begun, and no rank would wait for it for ever."""
        if self._started:
            return False
        several = any(int(os.environ.get(name, "1")) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))
        # torchrun ends all ranks when one ends, and signals ranks that wait for one that failed.
        return not several or ("TORCHELASTIC_RUN_ID" in os.environ and not is_distributed())


def release(trainer: Trainer, seconds: float = 10.0) -> None:
    """Let every rank end with a status other than 0; call it on all of them, last.

    Where Lightning started the further ranks, it watches them and kills rank 0 as soon as one has ended with such a
    status. Rank 0 stops watching, and waits for them, at most `seconds`, so that none outlives it.
    """
    watched: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    processes = list(watched)
    watched.clear()  # the list that Lightning's observer looks at
    barrier()
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _nothing() -> None:
    pass


def _say(message: str) -> None:
    os.write(2, f"mmpretrain: {message}\n".encode())  # print is not safe inside a handler
