"""CoCa's multimodal decoder: causal text tokens that read the tokens of another modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from mmpretrain.activation_checkpointing import checkpoint_activations
from mmpretrain.layers import Block, CrossBlock, KeyValueCache, init_transformer
from mmpretrain.packing import pack_rows, packed_dtype, worth_packing
from mmpretrain.types import Encoded


class DecoderState(NamedTuple):
    """What step-by-step decoding remembers: one cache for each self-attention layer."""

    caches: list[KeyValueCache]


class CrossAttentionFusion(nn.Module):
    """`depth` pairs of a causal self-attention block and a cross-attention block, then a norm: (B,L,width).

    `modality` is the one that is predicted, `context` the one it reads (tokens of `context_width`). Each half of a
    pair has its own MLP, as in released CoCa weights. Where the lengths of `modality` are known, its padding is not
    computed.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        context_width: int | None = None,
        modality: str = "text",
        context: str = "image",
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        context_width = width if context_width is None else context_width
        self.modality, self.context = modality, context
        self._head_width = width // num_heads
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, activation, norm_eps) for _ in range(depth))
        self.cross_blocks = nn.ModuleList(
            CrossBlock(width, num_heads, context_width, mlp_ratio, activation, norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        init_transformer(self.blocks, width, depth)
        init_transformer(self.cross_blocks, width, depth)
        if gradient_checkpointing:
            checkpoint_activations(self, "full")

    def forward(self, encoded: Mapping[str, Encoded]) -> dict[str, Tensor]:
        """Fuse: `{modality: (B,L,width)}`, or nothing where the batch lacks one of the two modalities."""
        if self.modality not in encoded or self.context not in encoded:
            return {}
        text, context = encoded[self.modality], encoded[self.context]
        packing, x = None, text.tokens
        if text.mask is not None and text.lengths is not None and worth_packing(text.mask, text.lengths):
            packing = pack_rows(text.mask, text.lengths, packed_dtype(x), self._head_width, causal=True)
            x = packing.pack(x)
        for block, cross_block in zip(self.blocks, self.cross_blocks, strict=True):
            x = cross_block(block(x, None, True, None, packing), context.tokens, context.mask, packing)
        x = self.norm(x)
        return {self.modality: x if packing is None else packing.unpack(x)}

    def start(self) -> DecoderState:
        """Begin step-by-step decoding with empty caches."""
        return DecoderState([KeyValueCache() for _ in self.blocks])

    def extend(self, tokens: Tensor, context: Encoded, state: DecoderState) -> Tensor:
        """Decode further (B,n,width) tokens: equal to those positions of one full forward pass."""
        x = tokens
        for block, cross_block, cache in zip(self.blocks, self.cross_blocks, state.caches, strict=True):
            x = cross_block(block(x, causal=True, cache=cache), context.tokens, context.mask)
        return self.norm(x)  # type: ignore[no-any-return]
