"""Cross-entropy of a `Prediction`: captions (CoCa), later masked tokens and alignment."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.distributed import sum_over_ranks, world_size
from mmpretrain.errors import InputError
from mmpretrain.types import IGNORE_INDEX, Outputs, Prediction


def prediction_loss(prediction: Prediction) -> Tensor:
    """Sum of cross-entropies over the asked positions of hidden (B,L,D) @ weight (V,D)^T against labels (B,L).

    A sum, not a mean, because the mean is over the positions of all ranks.
    """
    hidden, weight, labels = prediction
    asked = labels != IGNORE_INDEX
    logits = F.linear(hidden[asked], weight)  # no logits for padding, which can be most of a batch
    # Softmax over a large vocabulary needs float32; float64 is kept for exact tests.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels[asked], reduction="sum")


class PredictionLoss:
    """Mean cross-entropy of the head `name` over all asked positions of the global batch.

    Dividing by each rank's own count would weigh tokens of short batches more; ranks share one count instead.
    """

    def __init__(self, name: str = "caption") -> None:
        self.name = name

    def __call__(self, outputs: Outputs) -> Tensor:
        """Compute this rank's share, whose mean over ranks is the mean over the global token count."""
        if self.name not in outputs.predictions:
            raise InputError(
                f"loss needs the prediction {self.name!r}, the model gives {sorted(outputs.predictions)}; "
                "add the head to model.heads or drop the loss"
            )
        prediction = outputs.predictions[self.name]
        count = sum_over_ranks((prediction.labels != IGNORE_INDEX).sum())
        return prediction_loss(prediction) * world_size() / count.clamp(min=1)
