"""Batches without their padding: the real positions of all rows, one after the other, and attention within each row.

Everything here has static shapes and reads the mask on its device; what the host must know, it knows from `Lengths`.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.errors import InputError
from mmpretrain.types import Lengths

try:  # a prototype in torch 2.10, whose causal switch was renamed since
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover
    varlen_attn = None  # type: ignore[assignment]

CAUSAL: dict[str, Any] = (
    {"is_causal": True}
    if varlen_attn is not None and "is_causal" in inspect.signature(varlen_attn).parameters
    else {"window_size": (-1, 0)}
)


class _Gather(torch.autograd.Function):
    """Take rows (K,...) -> (J,...) by index (J,); the gradient takes rows back, which is quicker than adding them.

    Row k of the input gets the gradient of row `back[k]` of the output where `kept[k]`, else zero: so it must be read
    nowhere else, which holds for packing and unpacking.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(back, kept)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back, kept = ctx.saved_tensors
        found = gradients[0].index_select(0, back)
        return found.masked_fill_(~kept.view(-1, *(1,) * (found.ndim - 1)), 0), None, None, None


class Packing(NamedTuple):
    """Where the real positions of (B,L) rows stand in one packed row of P places, and back.

    The places after the last real one, at least one, are fill: they repeat a real position, nothing reads them and
    they get no gradient. `row` and `place`: (P,) where a place comes from, row B for fill. `source`: (P,) the same in
    the flattened (B*L), `kept` (P,) where there is such a position. `inverse` and `real`: (B*L,) the way back.
    `ends`: (B,) where rows end. `starts`: (B+2,) int32 where rows start, then the fill, then P. `window` is at least
    the longest row. `bias`: (P/window,1,window,K) attention bias of `attend`, None where it has a kernel for packed
    rows.
    """

    row: Tensor
    place: Tensor
    source: Tensor
    kept: Tensor
    inverse: Tensor
    real: Tensor
    ends: Tensor
    starts: Tensor
    window: int = 0
    causal: bool = True
    bias: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """Leave the padding out: (B,L,...) -> (P,...)."""
        gathered: Tensor = _Gather.apply(x.flatten(0, 1), self.source, self.inverse, self.real)
        return gathered

    def unpack(self, x: Tensor) -> Tensor:
        """Put (P,...) back into (B,L,...); padding repeats a real position and passes no gradient."""
        gathered: Tensor = _Gather.apply(x, self.inverse, self.source, self.kept)
        return gathered.view(len(self.ends), -1, *x.shape[1:])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let each position of (P,heads,d) attend to those of its own row, up to itself if causal: (P,heads,d)."""
        if self.bias is None:
            longest, options = self.window + 128, CAUSAL if self.causal else {}  # the fill is 128 places at most
            return cast(Tensor, varlen_attn(q, k, v, self.starts, self.starts, longest, longest, **options))
        return _attend_in_windows(q, k, v, self.window, self.bias)

    def attend_context(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let (P,heads,d) attend to all of their row's context (B,M,heads,d), with the kernel for packed rows."""
        length = k.shape[1]
        rows = torch.cat([self.starts[:-2], self.starts[-1:]])  # the fill reads the last row's context
        context = torch.arange(len(rows), dtype=torch.int32, device=q.device) * length
        k, v, longest = k.flatten(0, 1), v.flatten(0, 1), self.window + 128
        return cast(Tensor, varlen_attn(q, k, v, rows, context, longest, length))


def pack_rows(
    mask: Tensor, lengths: Lengths, dtype: torch.dtype, head_width: int, causal: bool, extra: Literal[0, 1] = 0
) -> Packing:
    """Plan to pack the real positions of `mask` (B,L), with `extra` places more at the end of each row, and to attend.

    `dtype` and `head_width` are those of the attention that will run; they decide by which kernel.
    """
    window = lengths.width + extra * 8
    if has_kernel(dtype, head_width, mask.device):
        return pack_places(mask, lengths, extra)._replace(window=window, causal=causal)
    packing = pack_places(mask, lengths, extra, window)
    return packing._replace(window=window, causal=causal, bias=_window_bias(packing.row, window, causal, dtype))


def pack_places(mask: Tensor, lengths: Lengths, extra: Literal[-1, 0, 1] = 0, multiple: int = 1) -> Packing:
    """Plan to pack the real positions of `mask` (B,L), with `extra` places more (or fewer) at the end of each row.

    P is a multiple of `multiple`. Rows must not be empty (see `worth_packing`). For what is not attended with.
    """
    batch, length = mask.shape
    places = -(-(lengths.room + extra * batch) // multiple) * multiple
    tokens = (mask.sum(1) + min(extra, 0)).clamp(min=0)
    ends = (tokens + max(extra, 0)).cumsum(0)
    first = F.pad(ends[:-1], (1, 0))
    at = torch.arange(places, device=mask.device)
    row = torch.searchsorted(ends, at, right=True)
    within = row.clamp(max=batch - 1)
    place = (at - first[within]).clamp(max=length - 1 + max(extra, 0))
    source = within * length + place.clamp(max=length - 1)
    kept = (row < batch) & (place < tokens[within])
    columns = torch.arange(length, device=mask.device)
    real = columns < tokens[:, None]
    inverse = (first[:, None] + columns * real).clamp(max=places - 1)
    starts = torch.cat([first, ends[-1:], at[-1:] + 1]).to(torch.int32)
    return Packing(row, place, source, kept, inverse.flatten(), real.flatten(), ends, starts)


def has_kernel(dtype: torch.dtype, head_width: int, device: torch.device) -> bool:
    """Whether `device` has a kernel for packed rows of such heads: a CUDA device of capability 8.0 (Ampere) or above.

    Heads are a multiple of 8 wide, at most 256 (FlashAttention 2).
    """
    if varlen_attn is None or dtype not in (torch.float16, torch.bfloat16) or device.type != "cuda":
        return False
    return head_width % 8 == 0 and head_width <= 256 and torch.cuda.get_device_properties(device).major >= 8


def packed_dtype(x: Tensor) -> torch.dtype:
    """Type in which a linear layer on `x` computes here, autocast or not."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def known_lengths(mask: Tensor | None, lengths: Lengths | None) -> Lengths | None:
    """Lengths of a batch, given or found where that costs nothing: from a prefix mask (B,L) on the CPU.

    None while a graph is recorded (`torch.jit.trace`, `torch.export`): the example's lengths are not those of its use.
    """
    if _records_a_graph():
        return None
    if mask is None or lengths is not None:
        return lengths
    if not _can_be_read(mask) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        return None
    return Lengths(mask.sum(1).numpy())


def check_lengths(values: Tensor, mask: Tensor | None, lengths: Lengths | None) -> None:
    """Raise `InputError` where `lengths` are not those of `values` (B,L), or of a mask that can be read for nothing."""
    if lengths is None or torch.compiler.is_compiling() or _records_a_graph():
        return
    if len(lengths) != len(values):
        raise InputError(f"lengths have {len(lengths)} rows, the batch has {len(values)}; give one length for each row")
    length, counts = values.shape[1], lengths.counts
    if mask is None:
        wrong = counts != length
    elif _can_be_read(mask):
        wrong = (mask.numpy() != (np.arange(length) < counts[:, None])).any(1)  # numpy: no operator of torch runs
    else:
        return
    if wrong.any():
        row = int(wrong.argmax())
        real = [True] * length if mask is None else mask[row].tolist()
        raise InputError(
            f"row {row} has length {counts[row]}, but its mask says {''.join('01'[int(r)] for r in real)} (1 = real); "
            "give the number of real positions if they come first in every row, otherwise lengths=None"
        )


def worth_packing(mask: Tensor | None, lengths: Lengths | None) -> bool:
    """Whether a batch has padding to leave out, as far as the host knows; not with an empty row, which has no end."""
    if mask is None or lengths is None or lengths.has_empty or _records_a_graph():
        return False
    return lengths.room < mask.numel()


def _can_be_read(mask: Tensor) -> bool:
    """Whether the host sees values; a compiler, and what only pretends to compute, has none."""
    return mask.device.type == "cpu" and type(mask) is Tensor and not torch.compiler.is_compiling()


def _records_a_graph() -> bool:
    return bool(torch.jit.is_tracing() or torch.compiler.is_exporting())  # type: ignore[attr-defined, no-untyped-call]


def _attend_in_windows(q: Tensor, k: Tensor, v: Tensor, window: int, bias: Tensor) -> Tensor:
    """Attend in windows that see themselves, the one before and, if `bias` has room, the one after.

    No row is longer than a window, so a row lies in at most two that follow each other.
    """
    q = _windows(q, window)
    before, after = bias.shape[-1] > window, bias.shape[-1] > 2 * window
    k, v = (_neighbours(_windows(x, window), before, after) for x in (k, v))
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias
    out: Tensor = logits.softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(0, 1)


def _windows(x: Tensor, window: int) -> Tensor:
    return x.view(-1, window, *x.shape[1:]).transpose(1, 2)


def _neighbours(x: Tensor, before: bool, after: bool) -> Tensor:
    parts = [x.roll(1, 0)] * before + [x] + [x.roll(-1, 0)] * after
    return torch.cat(parts, dim=2) if len(parts) > 1 else x


def _window_bias(row: Tensor, window: int, causal: bool, dtype: torch.dtype) -> Tensor:
    """Bias (P/window,1,window,K): 0 where a position may be attended to, minus infinity elsewhere."""
    count = len(row) // window
    rows = row.view(count, window)
    keys = _neighbours_of_rows(rows, causal)
    offset = torch.arange(keys.shape[1], device=row.device) - window
    query = torch.arange(window, device=row.device)
    allowed = rows[:, :, None] == keys[:, None, :]
    if causal:
        allowed = allowed & (offset <= query[:, None])
    return torch.zeros((), dtype=dtype, device=row.device).where(allowed, -torch.inf)[:, None]


def _neighbours_of_rows(rows: Tensor, causal: bool) -> Tensor:
    """Rows of the places that each window reads (count,2 or 3 windows); -1 outside."""
    outside = F.pad(rows, (0, 0, 1, 1), value=-1)
    parts = [outside[:-2], rows] + ([] if causal else [outside[2:]])
    return torch.cat(parts, dim=1)
