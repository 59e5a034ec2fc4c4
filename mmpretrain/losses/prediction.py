"""Cross-entropy of a `Prediction` without its logits: captions (CoCa), later masked tokens and alignment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmpretrain.distributed import sum_over_ranks, world_size
from mmpretrain.errors import InputError
from mmpretrain.losses.tiles import check_first_derivative
from mmpretrain.types import IGNORE_INDEX, Outputs, Prediction

CPU_LOGITS, GPU_LOGITS = 2**24, 2**26
"""Logits held at once: each chunk of rows also adds its part to the gradient of the whole weight."""


@torch.library.custom_op("mmpretrain::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    precision: torch.dtype,
    chunk_size: int,
    select: bool,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of cross-entropies of hidden (P,D) @ weight (V,D)^T against labels (P,), and both gradients.

    `precision` is that of the products; softmax, sums and the gradient of the weight are float32 at least. Holds
    (chunk_size,V) logits. `select` leaves out the rows at which nothing is asked, whose number the host must then know.
    The gradients are made here, while a chunk's logits are at hand; they are empty where `with_gradients` is False.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        exact = torch.promote_types(precision, torch.float32)
        asked, chosen = hidden, None
        if select:
            chosen = (labels != IGNORE_INDEX).nonzero().squeeze(1)
            asked, labels = hidden[chosen], labels[chosen]
        vocabulary = weight.to(precision)
        loss = hidden.new_zeros((), dtype=exact)
        grad_asked = torch.empty_like(asked) if with_gradients else asked.new_empty(0)
        grad_weight = torch.zeros_like(weight, dtype=exact) if with_gradients else weight.new_empty(0, dtype=exact)
        for start in range(0, len(asked), chunk_size):
            rows = slice(start, start + chunk_size)
            label = labels[rows, None]
            counts = label != IGNORE_INDEX
            label = label.clamp(min=0)
            part = asked[rows].to(precision).masked_fill(~counts, 0)  # where nothing is asked anything may stand
            logits = (part @ vocabulary.T).to(exact)
            logits -= logits.amax(1, keepdim=True)
            right = logits.gather(1, label)
            total = logits.exp_().sum(1, keepdim=True)
            loss += (total.log() - right).mul_(counts).sum()
            if with_gradients:
                slope = logits.mul_(counts / total)
                slope.scatter_add_(1, label, -counts.to(exact))
                slope = slope.to(precision)
                grad_asked[rows] = slope @ vocabulary
                if precision == exact:
                    grad_weight.addmm_(slope.T, part)
                else:
                    grad_weight += slope.T @ part
        grad_hidden = grad_asked
        if with_gradients and chosen is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, chosen, grad_asked)
        return loss, grad_hidden, grad_weight.to(weight.dtype)


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    precision: torch.dtype,
    chunk_size: int,
    select: bool,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.promote_types(precision, torch.float32))
    if with_gradients:
        return loss, torch.empty_like(hidden), torch.empty_like(weight)
    return loss, hidden.new_empty(0), weight.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    check_first_derivative("torch's cross_entropy of the logits")
    return *(gradient.to(saved.dtype) * saved for saved in ctx.saved_tensors), *[None] * 5


linear_cross_entropy.register_autograd(_backward, setup_context=_save)


def prediction_loss(prediction: Prediction) -> Tensor:
    """Sum of cross-entropies over the asked positions of hidden (B,L,D) @ weight (V,D)^T against labels (B,L).

    Packed positions, hidden (P,D) and labels (P,), do as well. (P,V) logits are never held, only those of a chunk of
    rows. A sum, not a mean, because the mean is over the positions of all ranks. First derivatives only.
    """
    hidden, weight, labels = prediction
    device, precision = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and precision != torch.float64:
        precision = torch.get_autocast_dtype(device)
    chunk_size = max(1, (CPU_LOGITS if device == "cpu" else GPU_LOGITS) // len(weight))
    select = device == "cpu"  # a GPU would have to be asked how many rows there are, and the host to wait for it
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    settings = precision, chunk_size, select, learns
    loss: Tensor = linear_cross_entropy(hidden.flatten(0, -2), weight, labels.flatten(), *settings)[0]
    return loss


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
