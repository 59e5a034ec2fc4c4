"""CoCa's multimodal decoder: causal text tokens that read the tokens of another modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmpretrain.layers import Block, CrossBlock, KeyValueCache, init_transformer
from mmpretrain.types import Encoded


class DecoderState(NamedTuple):
    """What step-by-step decoding remembers: one cache for each self-attention layer."""

    caches: list[KeyValueCache]


class CrossAttentionFusion(nn.Module):
    """`depth` pairs of a causal self-attention block and a cross-attention block, then a norm: (B,L,width).

    `modality` is the one that is predicted, `context` the one it reads (tokens of `context_width`). Each half of a
    pair has its own MLP, as in released CoCa weights.
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
        self.modality, self.context, self.gradient_checkpointing = modality, context, gradient_checkpointing
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, activation, norm_eps) for _ in range(depth))
        self.cross_blocks = nn.ModuleList(
            CrossBlock(width, num_heads, context_width, mlp_ratio, activation, norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        init_transformer(self.blocks, width, depth)
        init_transformer(self.cross_blocks, width, depth)

    def forward(self, encoded: Mapping[str, Encoded]) -> dict[str, Tensor]:
        """Fuse: `{modality: (B,L,width)}`, or nothing where the batch lacks one of the two modalities."""
        if self.modality not in encoded or self.context not in encoded:
            return {}
        x, context = encoded[self.modality].tokens, encoded[self.context]
        for block, cross_block in zip(self.blocks, self.cross_blocks, strict=True):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, None, True, use_reentrant=False)
                x = checkpoint(cross_block, x, context.tokens, context.mask, use_reentrant=False)
            else:
                x = cross_block(block(x, causal=True), context.tokens, context.mask)
        return {self.modality: self.norm(x)}

    def start(self) -> DecoderState:
        """Begin step-by-step decoding with empty caches."""
        return DecoderState([KeyValueCache() for _ in self.blocks])

    def extend(self, tokens: Tensor, context: Encoded, state: DecoderState) -> Tensor:
        """Decode further (B,n,width) tokens: equal to those positions of one full forward pass."""
        x = tokens
        for block, cross_block, cache in zip(self.blocks, self.cross_blocks, state.caches, strict=True):
            x = cross_block(block(x, causal=True, cache=cache), context.tokens, context.mask)
        return self.norm(x)  # type: ignore[no-any-return]
