"""Pretrain multimodal encoders: separate encoders, one shared space, fusion, proven losses, sharded data.

Public names load on first use, so that `import mmpretrain` stays quick and brings no lightning, hydra or webdataset.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmpretrain.encoders import (
        CascadedAttentionPool,
        ClassTokenPool,
        HuggingFaceTextEncoder,
        ImageEncoder,
        NaFlexImageEncoder,
        ParallelAttentionPool,
        SharedAttentionPool,
        TextEncoder,
    )
    from mmpretrain.errors import InputError
    from mmpretrain.fusion import CrossAttentionFusion
    from mmpretrain.heads import CaptionHead
    from mmpretrain.losses import (
        ContrastiveLoss,
        MultiPositiveContrastiveLoss,
        PredictionLoss,
        PreservationLoss,
        SigmoidLoss,
        SimilarityPreservationLoss,
        contrastive_loss,
        multi_positive_contrastive_loss,
        prediction_loss,
        preservation_loss,
        ring_contrastive_loss,
        ring_sigmoid_loss,
        sigmoid_loss,
        similarity_preservation_loss,
        tiled_contrastive_loss,
        tiled_sigmoid_loss,
    )
    from mmpretrain.model import MultimodalModel
    from mmpretrain.pretrained import Pretrained, load, save
    from mmpretrain.types import IGNORE_INDEX, Batch, Encoded, Lengths, Outputs, Padded, Prediction

__version__ = "0.1.0"

_HOMES = {
    "mmpretrain.types": ("IGNORE_INDEX", "Batch", "Encoded", "Lengths", "Outputs", "Padded", "Prediction"),
    "mmpretrain.errors": ("InputError",),
    "mmpretrain.encoders": (
        "CascadedAttentionPool",
        "ClassTokenPool",
        "HuggingFaceTextEncoder",
        "ImageEncoder",
        "NaFlexImageEncoder",
        "ParallelAttentionPool",
        "SharedAttentionPool",
        "TextEncoder",
    ),
    "mmpretrain.fusion": ("CrossAttentionFusion",),
    "mmpretrain.heads": ("CaptionHead",),
    "mmpretrain.losses": (
        "ContrastiveLoss",
        "MultiPositiveContrastiveLoss",
        "PredictionLoss",
        "PreservationLoss",
        "SigmoidLoss",
        "SimilarityPreservationLoss",
        "contrastive_loss",
        "multi_positive_contrastive_loss",
        "prediction_loss",
        "preservation_loss",
        "ring_contrastive_loss",
        "ring_sigmoid_loss",
        "sigmoid_loss",
        "similarity_preservation_loss",
        "tiled_contrastive_loss",
        "tiled_sigmoid_loss",
    ),
    "mmpretrain.model": ("MultimodalModel",),
    "mmpretrain.pretrained": ("Pretrained", "load", "save"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 (grouped as the README's table: types, model, encoders, fusion, heads, losses, files)
    "IGNORE_INDEX",
    "Batch",
    "Encoded",
    "Lengths",
    "Outputs",
    "Padded",
    "Prediction",
    "InputError",
    "MultimodalModel",
    "CascadedAttentionPool",
    "ClassTokenPool",
    "HuggingFaceTextEncoder",
    "ImageEncoder",
    "NaFlexImageEncoder",
    "ParallelAttentionPool",
    "SharedAttentionPool",
    "TextEncoder",
    "CrossAttentionFusion",
    "CaptionHead",
    "ContrastiveLoss",
    "MultiPositiveContrastiveLoss",
    "PredictionLoss",
    "PreservationLoss",
    "SigmoidLoss",
    "SimilarityPreservationLoss",
    "contrastive_loss",
    "multi_positive_contrastive_loss",
    "prediction_loss",
    "preservation_loss",
    "ring_contrastive_loss",
    "ring_sigmoid_loss",
    "sigmoid_loss",
    "similarity_preservation_loss",
    "tiled_contrastive_loss",
    "tiled_sigmoid_loss",
    "Pretrained",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mmpretrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
