"""Losses: pure functions below, thin callables above; each sees only `Outputs`."""

from mmpretrain.losses.contrastive import (
    ContrastiveLoss,
    MultiPositiveContrastiveLoss,
    contrastive_loss,
    multi_positive_contrastive_loss,
    ring_contrastive_loss,
    tiled_contrastive_loss,
)
from mmpretrain.losses.prediction import PredictionLoss, prediction_loss
from mmpretrain.losses.preservation import (
    PreservationLoss,
    SimilarityPreservationLoss,
    preservation_loss,
    similarity_preservation_loss,
)
from mmpretrain.losses.sigmoid import SigmoidLoss, ring_sigmoid_loss, sigmoid_loss, tiled_sigmoid_loss

__all__ = [
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
]
