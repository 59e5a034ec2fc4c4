"""Transformer parts that the encoders and the fusion share: attention, MLP, blocks, attention pooling.

Query, key, value and output are separate `Linear`s named `q`, `k`, `v`, `o`, so that adapters can attach to each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.errors import InputError
from mmpretrain.packing import Packing


def quick_gelu(x: Tensor) -> Tensor:
    """Sigmoid approximation of GELU that OpenAI's CLIP was trained with, x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class KeyValueCache:
    """Keys and values of the positions already seen by one attention layer, for generation step by step."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B,heads,n,d) keys and values, and return all of them."""
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)
        return self.keys, self.values

    def select(self, rows: Tensor) -> None:
        """Keep the given rows (B',) of the batch, in that order (beam search moves rows about)."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


class Attention(nn.Module):
    """Multi-head attention with separate projections; (B,N,width) attends to (B,M,context_width)."""

    def __init__(self, width: int, num_heads: int, context_width: int | None = None) -> None:
        super().__init__()
        if width % num_heads:
            raise InputError(f"width {width} is not a multiple of num_heads {num_heads}; change one of them")
        self.num_heads = num_heads
        self.fused_attn = True  # timm's name for the same switch; see `mmpretrain.training.cpu`
        context_width = width if context_width is None else context_width
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(context_width, width)
        self.v = nn.Linear(context_width, width)
        self.o = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, -1)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Attend; `mask` is bool, broadcastable to (B,heads,N,M), True = may be attended to.

        Give `mask` or `causal`, not both. With a `cache`, `x` holds only the new positions, each of which sees all
        cached ones and, if `causal`, the new ones up to itself. With a `packing`, `x` is (P,width) and attends to its
        own row: to itself as the packing says, or to a `context` (B,M,context_width).
        """
        read = x if context is None else context
        q, k, v = self._split(self.q(x)), self._split(self.k(read)), self._split(self.v(read))
        if packing is None:
            out = self._attend(q, k, v, mask, causal, cache)
        elif context is None:
            out = packing.attend(q, k, v)
        elif packing.bias is None and mask is None:
            out = packing.attend_context(q, k, v)
        else:
            out = packing.pack(self._attend(packing.unpack(q), k, v, mask, False, None))
        return self.o(out.flatten(-2))  # type: ignore[no-any-return]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, cache: KeyValueCache | None
    ) -> Tensor:
        """Let (B,N,heads,d) attend to (B,M,heads,d)."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        if causal and k.shape[2] != q.shape[2]:  # is_causal aligns the triangle top-left, which is wrong here
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
            causal = False
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        else:
            out = _plain_attention(q, k, v, mask, causal)
        return out.transpose(1, 2)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Compute attention (B,heads,N,d) in three plain operations: slower on a GPU, quicker on a CPU.

    A query that may attend to nothing gets zeros and passes no gradient, as in torch's fused attention.
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        # Finite, as minus infinity gives NaN where all is masked.
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    out: Tensor = logits.softmax(-1) @ v
    return out if mask is None or causal else out.masked_fill(~mask.any(-1, keepdim=True), 0)


class Mlp(nn.Module):
    """Two linear layers with an activation between, (...,width) -> (...,width)."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InputError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to each position."""
        return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm self-attention block."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, round(width * mlp_ratio), activation)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Transform (B,N,D) tokens, or packed ones (P,D)."""
        x = x + self.attention(self.norm1(x), mask=mask, causal=causal, cache=cache, packing=packing)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class CrossBlock(nn.Module):
    """Pre-norm block that attends to a context, with its own MLP and a separate norm for the context."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        context_width: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.context_norm = nn.LayerNorm(context_width, eps=norm_eps)
        self.attention = Attention(width, num_heads, context_width)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, round(width * mlp_ratio), activation)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Let (B,N,D) tokens, or packed ones (P,D), read (B,M,context_width); `mask` (B,M), True = may be read."""
        mask = None if mask is None else mask[:, None, None, :]
        x = x + self.attention(self.norm1(x), self.context_norm(context), mask=mask, packing=packing)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class AttentionPool(nn.Module):
    """Learned queries that read all tokens once: (B,M,context_width) -> (B,num_queries,width) (CoCa section 3.2)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_queries: int,
        context_width: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        context_width = width if context_width is None else context_width
        self.query = nn.Parameter(torch.randn(num_queries, width))
        self.query_norm = nn.LayerNorm(width, eps=norm_eps)
        self.context_norm = nn.LayerNorm(context_width, eps=norm_eps)
        self.attention = Attention(width, num_heads, context_width)

    def forward(self, context: Tensor) -> Tensor:
        """Pool tokens with every query."""
        query = self.query_norm(self.query).expand(context.shape[0], -1, -1)
        return self.attention(query, self.context_norm(context))  # type: ignore[no-any-return]


def init_transformer(blocks: nn.ModuleList, width: int, depth: int) -> None:
    """Initialise blocks as CLIP does: inputs by width^-0.5, residual outputs smaller with depth (OpenAI CLIP).

    Attention input std width^-0.5, attention output and second MLP layer width^-0.5 (2 depth)^-0.5, first MLP layer
    (2 width)^-0.5, biases zero.
    """
    output_std = width**-0.5 * (2 * depth) ** -0.5
    for module in blocks.modules():
        if isinstance(module, Attention):
            for layer in (module.q, module.k, module.v):
                nn.init.normal_(layer.weight, std=width**-0.5)
                nn.init.zeros_(layer.bias)
            nn.init.normal_(module.o.weight, std=output_std)
            nn.init.zeros_(module.o.bias)
        elif isinstance(module, Mlp):
            nn.init.normal_(module.up.weight, std=(2 * width) ** -0.5)
            nn.init.zeros_(module.up.bias)
            nn.init.normal_(module.down.weight, std=output_std)
            nn.init.zeros_(module.down.bias)
