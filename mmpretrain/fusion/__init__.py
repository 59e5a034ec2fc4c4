"""Fusion: what joins modalities, encoded modalities -> fused tokens."""

from mmpretrain.fusion.cross_attention import CrossAttentionFusion

__all__ = ["CrossAttentionFusion"]
