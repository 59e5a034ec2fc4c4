"""Fetch the shards of the coming steps in the background."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from mmpretrain.data.cache import REMOTE, fetch, scheme_of


class Prefetch:
    """Downloads, in daemon threads, the remote shards that the next `horizon` steps need; nothing for local ones.

    needed: step -> names of the shards that it reads (a pure function of the step; called from these threads, one
    call at a time). What `horizon` steps need together should fit into the cache, or it is removed before it is
    read. Nothing is raised here: a shard that cannot be fetched is asked for again by whoever reads it, and the
    error is raised there. Start it after processes were forked, and close it, also by `with`:

        prefetch = Prefetch(needed, first_step=100, horizon=50)
        for step in range(100, 1000):
            prefetch.advance(step)
            ...
        prefetch.close()
    """

    def __init__(
        self,
        needed: Callable[[int], Iterable[str]],
        first_step: int = 0,
        horizon: int = 50,
        cache_dir: str | os.PathLike[str] | None = None,
        threads: int = 3,
    ) -> None:
        self._needed = needed
        self._horizon = horizon
        self._cache_dir = cache_dir
        self._step = self._next = first_step  # the step that is read, the one to look at next
        self._queue: deque[str] = deque()
        self._asked: OrderedDict[str, int] = OrderedDict()  # name -> the last step that needed it
        self._looking = threading.Lock()  # held by the one thread that looks ahead or waits to
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True, name="prefetch") for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def advance(self, step: int) -> None:
        """Say that `step` is read now; returns at once."""
        with self._changed:
            self._step = max(self._step, step)
            self._changed.notify_all()

    def close(self) -> None:
        """Give up what is not fetched yet and end the threads."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=5.0)  # one may be inside a store's client, which has its own timeouts

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while (name := self._take()) is not None:
            try:
                fetch(name, self._cache_dir, self._closed)
            except Exception:  # raised again where it is read
                continue

    def _take(self) -> str | None:
        """Return the next shard to fetch, once there is one; None at the end."""
        with self._looking:
            while True:
                with self._changed:
                    if self._closed.is_set():
                        return None
                    if self._queue:
                        return self._queue.popleft()
                    self._next = max(self._next, self._step)  # what was read already needs no fetching
                    if self._next >= self._step + self._horizon:
                        self._changed.wait()
                        continue
                self._look_at(self._next)  # outside of the lock that `advance` takes
                self._next += 1

    def _look_at(self, step: int) -> None:
        """Queue the shards of a step, but not those queued for one of the last `horizon` steps."""
        for name in self._needed(step):
            if name not in self._asked and scheme_of(name) in REMOTE:
                self._queue.append(name)
            self._asked[name] = step
            self._asked.move_to_end(name)
        while self._asked and next(iter(self._asked.values())) < step - self._horizon:
            self._asked.popitem(last=False)
