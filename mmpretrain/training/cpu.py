"""What makes training on a CPU quick without changing a number."""

from __future__ import annotations

from torch import nn


def use_plain_attention(model: nn.Module) -> None:
    """Turn fused attention off in every part that has the switch, ours and timm's.

    With torch's fused kernel in bfloat16 a step of the demo's size takes 1.4 to 1.5 times as long on a CPU as with the
    same three products (`benchmarks/cpu_step.py`), and memory for short sequences is no concern there.
    """
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            setattr(part, "fused_attn", False)  # noqa: B010 (the type of a module's attributes is not known)
