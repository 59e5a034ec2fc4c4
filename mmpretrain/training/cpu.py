"""What makes training on a CPU quick without changing a number."""

from __future__ import annotations

import ctypes
import sys

from torch import nn

# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    By default every large tensor is mapped from the kernel, page by page, and given back when freed, which takes about
    15 % of a small model's step. Does nothing on other systems.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


def use_plain_attention(model: nn.Module) -> None:
    """Turn fused attention off in every part that has the switch, ours and timm's.

    On a CPU torch's fused kernel takes 4 to 7 times as long as the same three products in bfloat16 (16 and 65 tokens,
    heads of 64, AVX-512), and memory for short sequences is no concern there.
    """
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            setattr(part, "fused_attn", False)  # noqa: B010 (the type of a module's attributes is not known)
