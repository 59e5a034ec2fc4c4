"""Encoders: one file per modality, raw values -> `Encoded`."""

from mmpretrain.encoders.image import (
    CascadedAttentionPool,
    ImageEncoder,
    ParallelAttentionPool,
    SharedAttentionPool,
)
from mmpretrain.encoders.text import TextEncoder

__all__ = [
    "CascadedAttentionPool",
    "ImageEncoder",
    "ParallelAttentionPool",
    "SharedAttentionPool",
    "TextEncoder",
]
