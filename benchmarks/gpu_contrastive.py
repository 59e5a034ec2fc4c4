"""Contrastive and sigmoid losses on a GPU, 8k to 262k pairs: peak bytes, milliseconds, and error of loss and gradients.

Part of `python -m benchmarks.gpu`. Inputs are float32 unit vectors under bf16 autocast, as a training step gives them,
with the logit scale at CLIP's limit of 100. Errors are against a reference made tile by tile: float64 up to 32k pairs,
float32 without TF32 above. A side that has no memory for a size says so, and one that would take too long is left out.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import _gpu
from benchmarks import _harness as harness

SIZES = (8192, 16384, 32768, 65536, 131072, 262144)
WIDTH, SCALE, BIAS = 512, 100.0, -10.0
COMPARED = 32768
"""The size at which ratios have targets: 1/50 of open_clip's memory, twice as quick as inf-cl."""
EXACT = 32768
"""The largest size whose reference is float64."""
CLIP_TARGETS = {("open_clip", "bytes"): 50.0, ("inf-cl", "seconds"): 2.0}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(N,D) and (N,D) unit vectors, and ln(scale) (): -> the loss."""


class Found(NamedTuple):
    """What was measured of one side at one size; errors are relative in the Euclidean norm."""

    bytes: int
    seconds: list[float]
    loss_error: float
    gradient_error: float


def ours(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """Our symmetric contrastive loss, which chooses by size how it is computed."""
    from mmpretrain.losses import ContrastiveLoss

    return ContrastiveLoss()(_outputs(a, b, log_scale, None))


def ours_sigmoid(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """Our sigmoid loss."""
    from mmpretrain.losses import SigmoidLoss

    return SigmoidLoss()(_outputs(a, b, log_scale, torch.full((1,), BIAS, device=a.device)))


def _outputs(a: Tensor, b: Tensor, log_scale: Tensor, bias: Tensor | None) -> Any:
    from mmpretrain.types import Outputs

    return Outputs({"image": a, "text": b}, log_scale.exp().reshape(1), bias, {}, {})


def open_clip_loss(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """open_clip's `ClipLoss` on one device."""
    from open_clip.loss import ClipLoss

    return ClipLoss()(a, b, log_scale.exp())  # type: ignore[no-any-return]


def open_clip_sigmoid(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """open_clip's `SigLipLoss` on one device."""
    from open_clip.loss import SigLipLoss

    return SigLipLoss()(a, b, log_scale.exp(), torch.full((), BIAS, device=a.device))  # type: ignore[no-any-return]


def inf_cl_loss(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """Inf-CL's fused kernel on one device, once for each direction, since a call gives one."""
    from inf_cl import cal_flash_loss

    labels, scale = torch.arange(len(a), device=a.device), log_scale.exp()
    found = cal_flash_loss(a, b, labels, scale).mean() + cal_flash_loss(b, a, labels, scale).mean()
    return found / 2  # type: ignore[no-any-return]


def siglip_kernel_loss(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """siglip-kernel with bf16 features, which it recommends and is quickest with."""
    from siglip_kernel import fused_siglip_loss

    bias = torch.full((), BIAS, device=a.device)
    return fused_siglip_loss(a.bfloat16(), b.bfloat16(), log_scale, bias)  # type: ignore[no-any-return]


CLIP: dict[str, Loss] = {"ours": ours, "open_clip": open_clip_loss, "inf-cl": inf_cl_loss}
SIGMOID: dict[str, Loss] = {
    "ours": ours_sigmoid,
    "open_clip": open_clip_sigmoid,
    "siglip-kernel": siglip_kernel_loss,
}
NEEDS = {"inf-cl": "inf_cl", "siglip-kernel": "siglip_kernel"}


def measured(given: Any, clock: _gpu.Clock, kind: str) -> harness.Report:
    """Measure every size that there is time for; `kind` is `clip` or `sigmoid`."""
    losses = CLIP if kind == "clip" else SIGMOID
    device = torch.device(given.device)
    usable = [name for name in losses if name not in NEEDS or _usable(NEEDS[name], device)]
    notes = [f"{name} needs a CUDA device and its package; it was left out." for name in losses if name not in usable]
    table: dict[int, dict[str, Found]] = {}
    for size in given.sizes:
        # Who had no memory for a size, or failed at it, is not asked for a larger one.
        begun = [name for name in usable if not table or name in list(table.values())[-1]]
        if clock.left() < _estimate(table):
            notes.append(f"{size} pairs and above: no time was left.")
            break
        harness.note(f"contrastive_memory {kind}: {size} pairs")
        table[size] = at_size(size, {n: losses[n] for n in begun}, kind, given, device, notes)
    return _report(kind, table, given, notes)


def _usable(module: str, device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec(module) is not None


def _estimate(table: Mapping[int, Mapping[str, Found]]) -> float:
    """Guess the seconds that the next size takes: four times the last, which grew with the square."""
    if not table:
        return 0.0
    last = list(table.values())[-1]
    return 4 * sum(8 * statistics.median(found.seconds) for found in last.values()) + 2


def at_size(
    size: int, losses: Mapping[str, Loss], kind: str, given: Any, device: torch.device, notes: list[str]
) -> dict[str, Found]:
    """Measure every side that has memory for it: errors and bytes first, then rounds that alternate."""
    a, b = vectors(size, given.width, device)
    value, *expected = reference(a, b, SCALE, kind, given.tile, torch.float64 if size <= EXACT else torch.float32)
    counted: dict[str, tuple[int, float, float]] = {}
    for name, loss in losses.items():
        try:
            run(loss, a, b)  # compiles what is compiled at the first call
            held: list[Any] = []
            needed = _gpu.peak(lambda loss=loss, held=held: held.extend(run(loss, a, b)), device)  # type: ignore[misc]
        except torch.cuda.OutOfMemoryError:
            notes.append(f"{name} has no memory for {size:,} pairs.")
            _gpu.release(device)
            continue
        except Exception as error:
            if name == "ours":
                raise
            notes.append(f"{name} fails at {size:,} pairs: {type(error).__name__}: {str(error)[:200]}")
            continue
        found, *gradients = held
        error = max(_distance(g, e) for g, e in zip(gradients, expected, strict=True))
        counted[name] = needed, abs(float(found) - value) / abs(value), error
        del held, gradients
    harness.check({f"{size} pairs, {name}'s gradients": (counted[name][2], given.tolerance) for name in counted})
    sides = {
        name: lambda loss=losses[name]: _gpu.timed(lambda i: run(loss, a, b), 1, device)  # type: ignore[misc]
        for name in counted
    }
    seconds = harness.alternate(sides, given.rounds)
    return {name: Found(counted[name][0], seconds[name], *counted[name][1:]) for name in counted}


def vectors(size: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw pairs of unit vectors (N,D) that resemble each other, as after some training."""
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, width, device=device, generator=generator)
    b = a + 2 * torch.randn(size, width, device=device, generator=generator)
    return F.normalize(a, dim=-1), F.normalize(b, dim=-1)


def run(loss: Loss, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward and backward: the loss and the gradients of both inputs and of ln(scale)."""
    x, y = a.detach().requires_grad_(), b.detach().requires_grad_()
    log_scale = torch.full((), SCALE, device=a.device).log().requires_grad_()
    with torch.autocast(a.device.type, torch.bfloat16):
        value = loss(x, y, log_scale)
    return value.detach(), *torch.autograd.grad(value, (x, y, log_scale))


def reference(
    a: Tensor, b: Tensor, scale: float, kind: str, tile: int, dtype: torch.dtype
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Loss, and gradients of a, b and ln(scale), from the formulas, a tile of rows at a time in `dtype`."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    n, y = len(a), b.to(dtype)
    total, d_scale = torch.zeros((), dtype=dtype, device=a.device), torch.zeros((), dtype=dtype, device=a.device)
    d_a, d_b = torch.empty_like(a, dtype=dtype), torch.zeros_like(b, dtype=dtype)
    columns = torch.full((n,), -torch.inf, dtype=dtype, device=a.device)
    parts = [slice(start, min(n, start + tile)) for start in range(0, n, tile)]
    for part in parts if kind == "clip" else ():
        columns = torch.logaddexp(columns, (scale * a[part].to(dtype) @ y.T).logsumexp(0))
    for part in parts:
        x = a[part].to(dtype)
        logits = scale * x @ y.T
        at = torch.arange(len(x), device=a.device)
        if kind == "clip":
            rows = logits.logsumexp(1, keepdim=True)
            total += (0.5 * (rows[:, 0] + columns[part]) - logits[at, at + part.start]).sum()
            gradient = 0.5 * ((logits - rows).exp() + (logits - columns).exp())
            gradient[at, at + part.start] -= 1
        else:
            logits += BIAS
            gradient = logits.sigmoid()
            total += F.softplus(logits).sum() - logits[at, at + part.start].sum()
            gradient[at, at + part.start] -= 1
            logits -= BIAS
        gradient /= n
        d_scale += (gradient * logits).sum()
        d_a[part] = scale * gradient @ y
        d_b += scale * gradient.T @ x
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return float(total) / n, d_a, d_b, d_scale


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.to(expected.dtype) - expected).norm() / expected.norm())


def _report(kind: str, table: Mapping[int, Mapping[str, Found]], given: Any, notes: list[str]) -> harness.Report:
    rows, checked = [], {}
    for size, sides in table.items():
        for name, found in sides.items():
            checked[f"{size} pairs, {name}: loss"] = found.loss_error
            checked[f"{size} pairs, {name}: gradients"] = found.gradient_error
            if name == "ours" or "ours" not in sides:
                continue
            mine = sides["ours"]
            memory, speed = (
                CLIP_TARGETS.get((name, what)) if kind == "clip" and size == COMPARED else None
                for what in ("bytes", "seconds")
            )
            label = f"{size:,} pairs"
            bytes_of = [[side.bytes / 2**20] for side in (mine, found)]
            times = [[1000 * s for s in side.seconds] for side in (mine, found)]
            rows.append(harness.Row(f"{label}, peak memory", "MiB", *bytes_of, name, False, memory))
            rows.append(harness.Row(f"{label}, time", "ms", *times, name, False, speed))
        if "ours" in sides and len(sides) == 1:
            mine = sides["ours"]
            notes.append(
                f"{size:,} pairs, ours alone: {mine.bytes / 2**20:,.0f} MiB, "
                f"{1000 * statistics.median(mine.seconds):,.1f} ms."
            )
    packages = ["torch", "open_clip_torch", *(NEEDS_DISTRIBUTION[n] for n in _names(table) if n in NEEDS)]
    settings = {"D": given.width, "logit scale": SCALE, "precision": "bf16 autocast", "rounds": given.rounds}
    return harness.Report(f"GPU contrastive_memory {kind}", rows, checked, packages, settings, notes)


NEEDS_DISTRIBUTION = {name: _gpu.DISTRIBUTIONS[module] for name, module in NEEDS.items()}


def _names(table: Mapping[int, Mapping[str, Found]]) -> list[str]:
    return sorted({name for sides in table.values() for name in sides})
