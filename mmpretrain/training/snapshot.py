"""A copy of a training state in memory of the CPU, so that training can go on while it is written."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Snapshot:
    """Copies tensors to memory that it keeps for the next time: pinned for whole tensors that lie on a GPU."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors; the next call writes over what this one returns."""
        old, self._copies = self._copies, {}
        for name, tensor in tensors.items():
            buffer = old.get(name)
            if isinstance(tensor, DTensor):
                if isinstance(buffer, DTensor) and buffer.to_local().shape == tensor.to_local().shape:
                    buffer.to_local().copy_(tensor.to_local(), non_blocking=True)
                else:
                    buffer = tensor.detach().to("cpu", copy=True)
            else:
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffer.copy_(tensor.detach(), non_blocking=True)
            self._copies[name] = buffer
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return dict(self._copies)
