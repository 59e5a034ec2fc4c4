"""Encoders: one file per modality, raw values -> `Encoded`."""

from mmpretrain.encoders.huggingface_text import HuggingFaceTextEncoder
from mmpretrain.encoders.image import (
    CascadedAttentionPool,
    ClassTokenPool,
    ImageEncoder,
    ParallelAttentionPool,
    SharedAttentionPool,
)
from mmpretrain.encoders.naflex import NaFlexImageEncoder
from mmpretrain.encoders.text import TextEncoder

__all__ = [
    "CascadedAttentionPool",
    "ClassTokenPool",
    "HuggingFaceTextEncoder",
    "ImageEncoder",
    "NaFlexImageEncoder",
    "ParallelAttentionPool",
    "SharedAttentionPool",
    "TextEncoder",
]
