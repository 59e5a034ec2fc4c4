"""Bytes that this process really sent through its TCP sockets, as the kernel counts them (Linux)."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

BYTES_SENT = 200
"""Where `tcpi_bytes_sent` is in Linux's `struct tcp_info` (include/uapi/linux/tcp.h), `tcpi_bytes_retrans` after it."""


def bytes_sent() -> int:
    """Sum of the payload over the connected TCP sockets of this process, what the kernel had to send again left out."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        number = int(entry.name)
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                    info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, again = struct.unpack_from("QQ", info, BYTES_SENT)
                    total += sent - again
        except OSError:  # the descriptor of the listing itself is gone by now
            continue
    return total


class CountSent(Callback):
    """Writes into `folder`, for each rank, the bytes sent from the end of step `first` to the end of step `last`."""

    def __init__(self, folder: str, first: int, last: int) -> None:
        self.folder, self.first, self.last, self.before = Path(folder), first, last, 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Read the counters at both steps."""
        if trainer.global_step == self.first:
            self.before = bytes_sent()
        if trainer.global_step == self.last:
            each = (bytes_sent() - self.before) / (self.last - self.first)
            (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(each))
