"""How a loader's worker treats signals: it outlives those meant for the run, and never outlives the run."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


class StartWorker:
    """The loader's `worker_init_fn`. Make it in the process that owns the loader.

    Schedulers and terminals signal the whole process group; the run then needs its workers until the next step
    boundary, so they ignore SIGTERM, SIGINT and SIGUSR1 unless it is their owner that ends them. When the owner dies,
    by any means, so does the worker (on Linux).
    """

    def __init__(self) -> None:
        self.owner = os.getpid()

    def __call__(self, worker: int) -> None:
        """Set up the calling worker process."""
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        if sys.platform != "linux":
            return
        # Blocked here and in every later thread, SIGTERM waits for the thread that can see who sent it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=self._obey_owner, name="signals", daemon=True).start()
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    def _obey_owner(self) -> None:
        while True:
            if signal.sigwaitinfo({signal.SIGTERM}).si_pid == self.owner:
                os._exit(0)
