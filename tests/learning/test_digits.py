"""Small models learn from real scans, and controls that must not learn do not.

Data: the 1,797 real 8x8 scans inside scikit-learn; two side by side are a picture (8x16), its caption names the left
and the right digit, so that order matters. 1,437 scans train, 360 others test; they are never mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from mmpretrain import (
    CaptionHead,
    CascadedAttentionPool,
    ContrastiveLoss,
    CrossAttentionFusion,
    ImageEncoder,
    MultimodalModel,
    Outputs,
    Padded,
    PredictionLoss,
    SigmoidLoss,
    TextEncoder,
)
from mmpretrain.generation import Decoder, greedy_ids
from mmpretrain.training.cpu import use_plain_attention
from mmpretrain.training.optim import parameter_groups, warmup_cosine

pytestmark = [pytest.mark.learning, pytest.mark.slow]

WORDS = [*map(str, range(10)), "left", "right", "then", "and", "<pad>", "<start>", "<end>"]
PAD, START, END = (WORDS.index(w) for w in ("<pad>", "<start>", "<end>"))
LENGTH, STEPS, BATCH = 8, 1500, 64
WIDTH = 96


@cache
def scans(train: bool) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    chosen = order[:1437] if train else order[1437:]
    return torch.tensor(digits.images, dtype=torch.float32)[chosen] / 8 - 1, torch.tensor(digits.target)[chosen]


def captions(left: Tensor, right: Tensor) -> Tensor:
    """(B,8) ids of '<start> left L then right R and <end>'."""
    words = [
        START,
        WORDS.index("left"),
        -1,
        WORDS.index("then"),
        WORDS.index("right"),
        -2,
        WORDS.index("and"),
        END,
    ]
    ids = torch.tensor(words).repeat(len(left), 1)
    ids[:, 2], ids[:, 5] = left, right
    return ids


def pairs(count: int, train: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    images, labels = scans(train)
    left, right = torch.randint(len(images), (2, count), generator=generator)
    pixels = torch.cat([images[left], images[right]], dim=2)[:, None].expand(-1, 3, -1, -1)
    return pixels, labels[left], labels[right]


def build(family: str) -> MultimodalModel:
    torch.manual_seed(0)
    args = {
        "img_size": (8, 16),
        "patch_size": 4,
        "embed_dim": WIDTH,
        "depth": 3,
        "num_heads": 4,
        "pre_norm": True,
    }
    if family == "clip":
        image, text = ImageEncoder("vit_tiny_patch16_224", args), {"pooling": "eos"}
    elif family == "siglip":
        image = ImageEncoder("vit_tiny_patch16_224", {**args, "class_token": False, "global_pool": "map"}, init="clip")
        text = {"causal": False, "pooling": "last", "table_std": WIDTH**-0.5}
    else:
        pool = CascadedAttentionPool(WIDTH, 4, 8)
        image = ImageEncoder("vit_tiny_patch16_224", {**args, "class_token": False, "global_pool": ""}, pool)
        text = {"pooling": "class_token"}
    encoders = {"image": image, "text": TextEncoder(len(WORDS), LENGTH, WIDTH, 2, 4, END, **text)}
    if family == "siglip":
        return MultimodalModel(64, encoders, logit_scale=10.0, logit_bias=-10.0)
    if family == "coca":
        heads = {"caption": CaptionHead(len(WORDS), WIDTH)}
        return MultimodalModel(64, encoders, CrossAttentionFusion(WIDTH, 2, 4), heads)
    return MultimodalModel(64, encoders)


def train(family: str, loss: Callable[[Outputs], Tensor], shuffle: bool = False) -> MultimodalModel:
    model = build(family)
    use_plain_attention(model)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.98))
    scheduler = warmup_cosine(optimizer, STEPS, 100)
    for _ in range(STEPS):
        pixels, left, right = pairs(BATCH, True, generator)
        ids = captions(left, right)
        if shuffle:
            ids = ids[torch.randperm(BATCH, generator=generator)]
        loss(model({"image": Padded(pixels), "text": Padded(ids)})).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
    return model.eval()


@torch.no_grad()
def scores(model: MultimodalModel) -> tuple[float, float]:
    """100-way zero-shot accuracy, and how often the true caption beats the swapped one, on unseen scans."""
    pixels, left, right = pairs(1000, False, torch.Generator().manual_seed(2))
    ten = torch.arange(10)
    classes = model.embed("text", captions(ten.repeat_interleave(10), ten.repeat(10)))
    logits = model.embed("image", pixels) @ classes.T
    accuracy = (logits.argmax(1) == left * 10 + right).float().mean().item()
    differ = left != right
    true, swapped = (logits.gather(1, column[:, None])[differ] for column in (left * 10 + right, right * 10 + left))
    return accuracy, (true > swapped).float().mean().item()


@torch.no_grad()
def exact_match(model: MultimodalModel, blank: bool) -> float:
    pixels, left, right = pairs(500, False, torch.Generator().manual_seed(3))
    decoder = Decoder(model, pixels)
    if blank:
        decoder.context = decoder.context._replace(tokens=torch.zeros_like(decoder.context.tokens))
    ids = greedy_ids(decoder, START, END, PAD, LENGTH)
    width = min(ids.shape[1], LENGTH)
    return (ids[:, :width] == captions(left, right)[:, :width]).all(1).float().mean().item() if width == LENGTH else 0.0


def test_clip_learns_digits_and_their_order():
    accuracy, order = scores(train("clip", ContrastiveLoss()))
    print(f"clip: zero-shot {accuracy:.3f}, order {order:.3f}")
    assert accuracy >= 0.70
    assert order >= 0.80


def test_shuffled_pairs_teach_nothing():
    accuracy, _ = scores(train("clip", ContrastiveLoss(), shuffle=True))
    print(f"shuffled: zero-shot {accuracy:.3f}")
    assert accuracy <= 0.03


def test_siglip_learns_digits_and_their_order():
    accuracy, order = scores(train("siglip", SigmoidLoss()))
    print(f"siglip: zero-shot {accuracy:.3f}, order {order:.3f}")
    assert accuracy >= 0.65
    assert order >= 0.80


def test_coca_learns_to_match_and_to_write():
    contrastive, caption = ContrastiveLoss(), PredictionLoss()
    model = train("coca", lambda outputs: contrastive(outputs) + 2 * caption(outputs))
    accuracy, _ = scores(model)
    written, blind = exact_match(model, blank=False), exact_match(model, blank=True)
    print(f"coca: zero-shot {accuracy:.3f}, exact match {written:.3f}, without image tokens {blind:.3f}")
    assert accuracy >= 0.70
    assert written >= 0.65
    assert blind <= 0.05
