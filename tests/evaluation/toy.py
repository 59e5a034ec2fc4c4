"""A real model small enough to follow by hand: a picture's colour and the sum of a text's colour words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmpretrain.model import MultimodalModel
from mmpretrain.pretrained import Pretrained
from mmpretrain.types import Encoded, Padded

WORDS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

# Colours A (1,0,0), B (0,1,0), C (0,0,1), D (2,1,0), E (0,1,2), F (2,0,1), in hundreds.
COLOURS = [(100, 0, 0), (0, 100, 0), (0, 0, 100), (200, 100, 0), (0, 100, 200), (200, 0, 100)]


class ColourEncoder(nn.Module):
    width = 3

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Encoded:
        tokens = values.float().flatten(2).transpose(1, 2)
        return Encoded(tokens.mean(1), tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool))


class WordEncoder(nn.Module):
    width = 3

    def __init__(self) -> None:
        super().__init__()
        table = torch.tensor([(0.0, 0.0, 0.0), *WORDS.values()])
        self.table = nn.Embedding.from_pretrained(table)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Encoded:
        tokens = self.table(values)
        return Encoded(tokens.sum(1), tokens, torch.ones_like(values, dtype=torch.bool))


class WordTokenizer:
    vocab_size = 4
    context_length = 16
    pad_id = 0
    eos_id = 0

    def __call__(self, texts: Sequence[str]) -> Padded:
        names = ["", *WORDS]
        rows = [[names.index(word) if word in names else 0 for word in text.split()] for text in texts]
        length = max(1, *(len(row) for row in rows))
        values = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return Padded(values, values > 0)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(["", *WORDS][i] for i in ids if i)


class Colours(Dataset[tuple[Tensor, Any]]):
    """Pictures of one colour each; built like torchvision's data sets."""

    def __init__(
        self, colours: Sequence[Sequence[int]], targets: Sequence[Any], transform: Callable[[Any], Any]
    ) -> None:
        self.colours, self.targets, self.transform = colours, targets, transform

    def __len__(self) -> int:
        return len(self.colours)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.transform(self.colours[index]), self.targets[index]


def picture(colour: Sequence[int]) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2)


def pretrained() -> Pretrained:
    identity = {"image": nn.Identity(), "text": nn.Identity()}
    model = MultimodalModel(3, {"image": ColourEncoder(), "text": WordEncoder()}, projections=identity)
    return Pretrained(model, picture, WordTokenizer())  # type: ignore[arg-type]
