"""The types that cross boundaries: what the data gives, what encoders and the model return, what losses see.

Legend of shape letters, used in every docstring of this package:

| letter | meaning |
| --- | --- |
| B | batch (this rank's samples) |
| G | global batch (all ranks' samples) |
| N | tokens of one sample, any modality |
| L | text length |
| D | encoder width |
| E | shared embedding size |
| V | vocabulary size |
| T | video frames |
| F | mel bins |
| C, H, W | channels, height, width |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmpretrain.errors import InputError

IGNORE_INDEX = -100
"""Label of a position at which nothing is asked (the value `torch.nn.functional.cross_entropy` skips)."""


class Lengths:
    """How many leading positions of each row are real, kept on the host, so nothing has to ask the device.

    `counts` (B,) int64, `total` their sum, `longest` the largest, `has_empty` whether one is 0 (such a batch is not
    packed). For tensors of few sizes: `room` is above the total by 1 to 128 (and by about 1/32 of it at most), `width`
    is `longest` rounded up to a multiple of 8. Raises `InputError` for counts that are not of shape (B,), or negative.

    A plain class: pinning and moving to a device walk into tuples and NamedTuples, not into this.
    """

    def __init__(self, counts: Sequence[int] | NDArray[np.int64]) -> None:
        self.counts: NDArray[np.int64] = np.asarray(counts, dtype=np.int64)
        if self.counts.ndim != 1 or (self.counts < 0).any():
            raise InputError(f"lengths are {counts!r}; expected one count of at least 0 for each row")
        self.total = int(self.counts.sum())
        self.longest = int(self.counts.max(initial=0))
        self.has_empty = not bool(self.counts.all())
        step = min(max(16, 2 ** (self.total.bit_length() - 6)), 128)
        self.room: int = (self.total // step + 1) * step
        self.width = max(-(-self.longest // 8) * 8, 8)

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        return f"Lengths({self.counts.tolist()})"

    def rows(self, rows: slice) -> Lengths:
        """Lengths of some rows."""
        return Lengths(self.counts[rows])


class Padded(NamedTuple):
    """One modality inside a batch.

    `values`: image (B,C,H,W) uint8 or float, text (B,L) int64, audio (B,1,F,T), video (B,T,C,H,W).
    `mask`: (B,L) or (B,T) bool, True = real; None = nothing is padding.
    `lengths`: what `mask` says, known to the host; only where the real positions of every row come first. None = not
    known. They must agree with the mask: on a CPU that is checked, elsewhere they are believed, as asking would wait.
    """

    values: Tensor
    mask: Tensor | None = None
    lengths: Lengths | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Padded:
        """Move both tensors to `device`; the lengths stay on the host."""
        mask = None if self.mask is None else self.mask.to(device, non_blocking=non_blocking)
        return Padded(self.values.to(device, non_blocking=non_blocking), mask, self.lengths)

    def rows(self, rows: slice) -> Padded:
        """Some rows of the batch."""
        return Padded(
            self.values[rows],
            None if self.mask is None else self.mask[rows],
            None if self.lengths is None else self.lengths.rows(rows),
        )


Batch = dict[str, Padded]
"""Modality name -> values."""


class Encoded(NamedTuple):
    """What every encoder returns: pooled (B,D) not normalised, tokens (B,N,D), mask (B,N) True = may be attended to.

    A mask of None says that all may be, without a tensor that has to be read.
    `lengths`: what `mask` says, where the host knows it (see `Padded`). Tokens beyond it are finite and mean nothing.
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor | None
    lengths: Lengths | None = None


class LayerInfo(NamedTuple):
    """One layer whose output an encoder can give: its name, its width D, and how many pixels a token spans (1: none).

    timm's `feature_info` says the same as `module`, `num_chs` and `reduction`.
    """

    name: str
    width: int
    reduction: int


class Prediction(NamedTuple):
    """A classification over a vocabulary that is not multiplied out.

    hidden (B,L,D), weight (V,D) the output embedding, labels (B,L) int64 with `IGNORE_INDEX` where nothing is asked.
    Packed, without what padding takes, they are hidden (P,D) and labels (P,): a loss flattens both shapes alike.
    The loss decides how to multiply, so that (B,L,V) logits need never exist.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor


class Outputs(NamedTuple):
    """What the model returns, and the only thing a loss sees.

    `embeddings`: modality -> (B,E) float32 of unit norm.
    `logit_scale`: (1,) already exponentiated.
    `logit_bias`: (1,), or None where the model has none.
    `predictions`: name of a head -> what it predicts.
    `identities`: modality -> (B,) int64, equal exactly where two rows carry the same token ids; only for modalities
    that are given as ids. A loss that counts coinciding captions as positives compares them, across ranks too.
    `original`: what the frozen model that fine-tuning began with makes of the batch; only where a loss asks for it.
    """

    embeddings: dict[str, Tensor]
    logit_scale: Tensor
    logit_bias: Tensor | None
    predictions: dict[str, Prediction]
    identities: dict[str, Tensor]
    original: Outputs | None = None


@runtime_checkable
class Encoder(Protocol):
    """Raw modality -> `Encoded`; `width` is D of its pooled output.

    An encoder with the class attribute `skips_padding = True` also takes the `Lengths` of the batch, or None, as third
    argument.
    """

    width: int

    def __call__(self, values: Tensor, mask: Tensor | None = None) -> Encoded:
        """Encode a batch."""


@runtime_checkable
class LayeredEncoder(Protocol):
    """An encoder that also gives the outputs of its inner layers, counted from 0, or from -1 at the end."""

    def encode_layers(
        self, values: Tensor, mask: Tensor | None = None, layers: Sequence[int] = (-1,), norm: bool = False
    ) -> list[Encoded]:
        """Encode a batch as each of `layers` gives it, with the encoder's final norm or without."""

    def layer_info(self) -> list[LayerInfo]:
        """List the layers."""


@runtime_checkable
class MapEncoder(LayeredEncoder, Protocol):
    """A layered encoder whose tokens lie on a grid."""

    def maps(self, values: Tensor, layers: Sequence[int] = (-1,), norm: bool = False) -> list[Tensor]:
        """Encode a batch as each of `layers` gives it: (B,D,H,W)."""


class Fusion(Protocol):
    """Encoded modalities -> fused tokens (B,N,D) of the modalities it predicts."""

    def __call__(self, encoded: Mapping[str, Encoded]) -> dict[str, Tensor]:
        """Join the modalities."""


class Head(Protocol):
    """Fused tokens and the batch they came from -> a `Prediction`."""

    def __call__(self, fused: Mapping[str, Tensor], batch: Batch) -> Prediction:
        """Predict."""


class Loss(Protocol):
    """`Outputs` -> scalar; averaging the scalar (and its gradients) over ranks gives the global batch's loss."""

    def __call__(self, outputs: Outputs) -> Tensor:
        """Compute the loss of this rank's share."""


@runtime_checkable
class Tokenizer(Protocol):
    """Texts -> ids (B,L) int64 and mask, each row from the start id (if any) to `eos_id`, then padding."""

    vocab_size: int
    context_length: int
    pad_id: int
    eos_id: int

    def __call__(self, texts: Sequence[str]) -> Padded:
        """Tokenize a batch of texts."""

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids back into text, leaving out start, end and padding ids."""
