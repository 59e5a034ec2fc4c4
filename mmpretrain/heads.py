"""Heads: what is predicted from fused tokens, as a `Prediction` that the loss multiplies out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmpretrain.packing import check_lengths, pack_places, worth_packing
from mmpretrain.types import IGNORE_INDEX, Batch, Prediction


class CaptionHead(nn.Module):
    """Next-token prediction with an untied output embedding (V,width) (CoCa section 3.2).

    Position i predicts token i+1; padding is never asked, and neither is anything before the first token.
    """

    needs_causal = True
    """The text encoder must not let position i see token i+1; checked when the model is built."""

    def __init__(self, vocab_size: int, width: int, modality: str = "text") -> None:
        super().__init__()
        self.modality = modality
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, fused: Mapping[str, Tensor], batch: Batch) -> Prediction:
        """Predict from fused (B,L,width) tokens: hidden (B,L-1,width) with labels (B,L-1).

        Where the lengths are known, only what is asked: hidden (P,width) with labels (P,). Raises `InputError` where
        they are seen not to be those of the mask.
        """
        values, mask, lengths = batch[self.modality]
        check_lengths(values, mask, lengths)
        hidden, labels = fused[self.modality], values[:, 1:]
        if mask is None:
            return Prediction(hidden[:, :-1], self.weight, labels)
        if lengths is not None and worth_packing(mask, lengths):
            packing = pack_places(mask, lengths, extra=-1)
            asked = packing.pack(values.roll(-1, 1)).masked_fill(~packing.kept, IGNORE_INDEX)
            return Prediction(packing.pack(hidden), self.weight, asked)
        return Prediction(hidden[:, :-1], self.weight, labels.masked_fill(~mask[:, 1:], IGNORE_INDEX))
