"""What the losses of this library cost one rank in one step: products, memory, and what they send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from mmpretrain.errors import InputError
from mmpretrain.losses import ContrastiveLoss, MultiPositiveContrastiveLoss, PredictionLoss, SigmoidLoss
from mmpretrain.losses.contrastive import PLAIN_UP_TO
from mmpretrain.losses.prediction import CPU_LOGITS, GPU_LOGITS
from mmpretrain.losses.tiles import tile_size_for
from mmpretrain.planning.measure import Asked, ModelCost
from mmpretrain.planning.traffic import Message
from mmpretrain.types import Loss

FLOAT32 = 4


class LossCost(NamedTuple):
    """One loss on one rank: FLOPs that the mathematics asks for and those done again, and whether they are float32
    products; bytes held at most, beside what the model keeps; what travels. `known` is False for a loss not of this
    library, of which nothing is counted."""

    useful: float
    recomputed: float
    float32: bool
    held: float
    messages: list[Message]
    known: bool = True


class Place(NamedTuple):
    """Where a loss is computed: rows of one rank, ranks, and the device."""

    rows: int
    ranks: int
    device: torch.device

    @property
    def columns(self) -> int:
        """Rows of all ranks."""
        return self.rows * self.ranks


def loss_costs(losses: Mapping[str, Loss], model: ModelCost, place: Place, half: bool) -> dict[str, LossCost]:
    """Cost of each loss; `half` says that autocast is on. Raises `InputError` where the model lacks what one needs."""
    return {name: _cost(name, loss, model, place, half) for name, loss in losses.items()}


def _cost(name: str, loss: Loss, model: ModelCost, place: Place, half: bool) -> LossCost:
    if isinstance(loss, PredictionLoss):
        if loss.name not in model.predictions:
            raise InputError(
                f"loss {name!r} needs the prediction {loss.name!r}, the model gives {sorted(model.predictions)}; "
                "add the head to model.heads or drop the loss"
            )
        return prediction(model.predictions[loss.name], place, half)
    if isinstance(loss, (ContrastiveLoss, MultiPositiveContrastiveLoss)):
        several = isinstance(loss, MultiPositiveContrastiveLoss)
        return contrastive(model.embed_dim, place, loss.tile_size, loss.exchange == "ring", several)
    if isinstance(loss, SigmoidLoss):
        return sigmoid(model.embed_dim, place, loss.tile_size, loss.exchange == "ring")
    return LossCost(0, 0, False, 0, [], known=False)


def contrastive(
    width: int, place: Place, tile_size: int | None = None, ring: bool = False, several: bool = False
) -> LossCost:
    """InfoNCE of `width` E: one product forward and two backward, the first again in the backward sweep.

    A small batch is not tiled: it multiplies both directions and gathers both modalities. `several` positives add the
    identities of all rows.
    """
    b, g, part = place.rows, place.columns, "contrastive"
    one = 2.0 * b * g * width
    identities = [Message(part, "all-gather", g * 8)] if several else []
    everyone = g * width * FLOAT32
    if not ring and tile_size is None and b * g <= PLAIN_UP_TO:
        travel = [Message(part, "all-gather", everyone, 2), Message(part, "reduce-scatter", everyone, 2)]
        return LossCost(3 * one, 3 * one, True, 6 * b * g * FLOAT32 + 4 * everyone, [*travel, *identities])
    tiles = _tiles(place, tile_size, b if ring else g)
    if ring:
        forward = (b * width + 2 * b) * FLOAT32
        backward = (2 * b * width + b) * FLOAT32
        travel = [Message(part, "send", forward, place.ranks), Message(part, "send", backward, place.ranks)]
        held = tiles + (2 * backward + 2 * b * width * FLOAT32)
    else:
        travel = [
            Message(part, "all-gather", everyone),
            Message(part, "all-reduce", g * FLOAT32, 2),
            Message(part, "reduce-scatter", everyone),
        ]
        held = tiles + 2 * everyone + 2 * b * width * FLOAT32 + 4 * g * FLOAT32
    return LossCost(3 * one, one, True, held, [*travel, *identities])


def sigmoid(width: int, place: Place, tile_size: int | None = None, ring: bool = True) -> LossCost:
    """Pairwise sigmoid: one product and two for the gradients, all in the forward sweep."""
    b, g, part = place.rows, place.columns, "sigmoid"
    block = b * width * FLOAT32
    tiles = _tiles(place, tile_size, b if ring else g)
    if ring:
        travel = [Message(part, "send", 2 * block, place.ranks)]
        held = tiles + 6 * block
    else:
        everyone = g * width * FLOAT32
        travel = [Message(part, "all-gather", everyone), Message(part, "reduce-scatter", everyone)]
        held = tiles + 2 * everyone + 2 * block
    return LossCost(3 * 2.0 * b * g * width, 0, True, held, travel)


def prediction(asked: Asked, place: Place, half: bool) -> LossCost:
    """Cross-entropy over a vocabulary: one product and two for the gradients, a chunk of logits at a time."""
    positions, width, vocabulary = place.rows * asked.positions, asked.width, asked.vocabulary
    limit = CPU_LOGITS if place.device.type == "cpu" else GPU_LOGITS
    chunk = min(positions, max(1, limit // vocabulary)) * vocabulary
    size = 2 if half else 4
    table = vocabulary * width
    held = chunk * (FLOAT32 + 2 * size) + table * (2 * FLOAT32 + 2 * size) + 2 * positions * width * FLOAT32
    flops = 3 * 2.0 * positions * width * vocabulary
    return LossCost(flops, 0, not half, held, [Message("token count", "all-reduce", 8)])


def _tiles(place: Place, tile_size: int | None, columns: int) -> float:
    size = tile_size_for(place.device, tile_size)
    return 2.0 * min(size, place.rows) * min(size, columns) * FLOAT32
