"""The device that a user names."""

from __future__ import annotations

import torch

from mmpretrain.errors import InputError


def usable(name: str | torch.device) -> torch.device:
    """Return a device; raises `InputError` for one that torch does not know or that is not there."""
    try:
        device = torch.device(name)
        if device.type != "cuda":  # a GPU is not touched: each rank takes its own
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            f"device {str(name)!r} cannot be used ({str(error).splitlines()[0]}); give cpu or cuda"
        ) from error
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise InputError(f"device {str(name)!r} cannot be used: torch finds {gpus} GPUs here; give cpu, or one of them")
    return device
