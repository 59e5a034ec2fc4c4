"""A report with real pictures and embeddings that have the structure of a trained model's."""

from __future__ import annotations

import math

import torch
from PIL import Image
from sklearn.datasets import load_digits

from mmpretrain.evaluation.report import Gallery, Report

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits(count: int, noise: float = 0.75) -> Gallery:
    """Handwritten digits, a caption each; pictures and captions lie in two clouds, pairs near each other."""
    data = load_digits()
    generator = torch.Generator().manual_seed(0)
    images = [Image.fromarray((255 - 15 * pixels).astype("uint8")) for pixels in data.images[:count]]
    captions = [f"a handwritten {NAMES[digit]}, number {n}" for n, digit in enumerate(data.target[:count])]
    meaning = torch.randn(count, 32, generator=generator)
    image, text = (meaning + noise * torch.randn(count, 32, generator=generator) for _ in range(2))
    generated = [f"a handwritten {NAMES[digit]}" for digit in data.target[:count]]
    return Gallery(images, captions, list(range(count)), image + 1, text - 0.5, generated)


def metrics() -> dict[str, float]:
    """Recalls and accuracy with their intervals and chance levels, and counts without."""
    flat = {"val/retrieval/images": 400.0}
    for key, value, chance in (
        ("val/retrieval/text_to_image/recall@1", 0.4212, 0.0025),
        ("val/retrieval/text_to_image/recall@5", 0.674, 0.0125),
        ("val/retrieval/image_to_text/recall@1", 0.4475, 0.0025),
        ("val/zero_shot/top1", 0.632, 0.1),
        ("val/zero_shot/mean_class_recall", 0.611, 0.1),
    ):
        flat |= {
            key: value,
            f"{key}/ci_low": value - 0.04,
            f"{key}/ci_high": value + 0.05,
            f"{key}/chance": chance,
        }
    return flat


def history(rows: int) -> list[dict[str, float]]:
    """Training that converges; the logit scale is known at every other step only."""
    found = []
    for step in range(1, rows + 1):
        loss = 0.5 + 3.5 * math.exp(-step / 90) + 0.05 * math.sin(step * 7.0)
        row = {
            "step": step,
            "loss/total": 1.5 * loss,
            "loss/contrastive": loss,
            "lr": 5e-4 * min(1.0, step / 30),
        }
        row["samples_per_second"] = 800 + 20 * math.sin(step)
        if step % 2:
            row["logit_scale"] = 14.3 + step / 9
        found.append(row)
    return found


def example(count: int = 400) -> Report:
    """A whole report."""
    return Report(
        title="Digits CLIP, seed 0",
        metrics=metrics(),
        history=history(300),
        config_yaml="model:\n  _target_: mmpretrain.MultimodalModel\n  embed_dim: 32\n  path: " + "long/" * 60 + "\n",
        versions={"mmpretrain": "0.1.0", "torch": "2.10.0"},
        card={
            "name": "Optical recognition of handwritten digits",
            "licence": "CC BY 4.0",
            "attribution": "E. Alpaydin and C. Kaynak",
            "url": "https://archive.ics.uci.edu/dataset/80",
        },
        gallery=digits(count),
    )
