"""The peer's side of a benchmark: open_clip needs an older webdataset than ours, so it runs in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

WEBDATASET = "0.2.86"
"""The newest that open_clip's own loader works with (its requirement is `webdataset<=0.2.86`)."""


def cache() -> Path:
    """Return where benchmarks keep what is made once: in the cache folder."""
    root = os.environ.get("MMPRETRAIN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "mmpretrain") / "bench"


def webdataset_folder() -> Path:
    """Return a folder with that webdataset alone; installed by pip at the first use, into the cache folder."""
    folder = cache() / f"webdataset-{WEBDATASET}"
    if not (folder / "webdataset" / "__init__.py").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, f"webdataset=={WEBDATASET}"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"webdataset {WEBDATASET}, which open_clip's loader needs, cannot be had:\n{done.stderr}")
    return folder


def environment(peer: bool, threads: int | None = None) -> Mapping[str, str]:
    """Return the environment of a side's process: the repository first, for the peer behind its webdataset."""
    root = str(Path(__file__).resolve().parents[1])
    found = dict(os.environ)
    paths = [*([str(webdataset_folder())] if peer else []), root, found.get("PYTHONPATH", "")]
    found["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if threads is not None:
        found["OMP_NUM_THREADS"] = str(threads)
    return found


class Worker:
    """A process that answers one JSON line for each JSON line it is sent."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command], env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Any:
        """Send a request and return the answer; raises `SystemExit` where the process ended."""
        sent, received = self.process.stdin, self.process.stdout
        assert sent is not None and received is not None
        sent.write(json.dumps(request) + "\n")
        sent.flush()
        line = received.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended with {self.process.wait()}")  # type: ignore[arg-type]
        return json.loads(line)

    def close(self) -> None:
        """End the process and wait for it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def answers() -> IO[str]:
    """Return the stream for answers; what libraries print goes to stderr from here on."""
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return stream
