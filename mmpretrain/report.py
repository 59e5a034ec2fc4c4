"""From a finished run to its `report.html`: collects what `evaluation.report` draws."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image

from mmpretrain.evaluation.embed import embed_images, embed_texts
from mmpretrain.evaluation.report import Gallery, Report, write_report
from mmpretrain.evaluation.retrieval import Retrieval, captions_of
from mmpretrain.pretrained import Pretrained
from mmpretrain.secrets import masked_yaml

PACKAGES = (
    "mmpretrain-contrastive",
    "torch",
    "timm",
    "lightning",
    "hydra-core",
    "webdataset",
    "torchmetrics",
    "pillow",
)


def report_run(
    folder: Path,
    config: DictConfig,
    pretrained: Pretrained,
    metrics: Mapping[str, float],
    evaluators: Mapping[str, Any],
) -> Path:
    """Write `folder/report.html` from the run's metrics, its curves and the pictures its retrieval was scored on."""
    path = folder / "report.html"
    write_report(
        path,
        Report(
            title=config.name,
            metrics=dict(metrics),
            history=history(folder / "metrics.csv"),
            config_yaml=masked_yaml(config),
            versions=versions(),
            card=card(config.data.get("card")),
            gallery=gallery(pretrained, evaluators),
        ),
    )
    return path


def history(path: Path) -> list[dict[str, float]]:
    """Read the rows of a `metrics.csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def versions() -> dict[str, str]:
    """Name what the run was made with."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def card(path: str | None) -> dict[str, str] | None:
    """Read the data set's card, where it has one."""
    if path is None or not Path(path).is_file():
        return None
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    return {key: str(value) for key, value in found.items() if isinstance(value, str)}


def gallery(pretrained: Pretrained, evaluators: Mapping[str, Any], limit: int = 2000) -> Gallery | None:
    """Embed the pictures and captions of the first retrieval evaluator, and caption them where the model can."""
    retrieval = next((e for e in evaluators.values() if isinstance(e, Retrieval)), None)
    if retrieval is None:
        return None
    model = pretrained.model.eval()
    data: Any = retrieval.data(transform=pretrained.preprocess)
    if len(data) > limit:
        data = torch.utils.data.Subset(data, range(limit))
    images = embed_images(model, data, retrieval.batch_size, 0)
    captions = captions_of(images.targets)
    flat = [caption for own in captions for caption in own]
    return Gallery(
        images=[_picture(data[i][0]) for i in range(len(data))],
        captions=flat,
        image_of_caption=[i for i, own in enumerate(captions) for _ in own],
        image_embeddings=images.embeddings,
        text_embeddings=embed_texts(model, pretrained.tokenizer, flat, retrieval.batch_size),
        generated=_captions(pretrained, data) if model.heads else None,
    )


def _captions(pretrained: Pretrained, data: Sequence[Any]) -> list[str]:
    from mmpretrain.generation import greedy

    written: list[str] = []
    for start in range(0, len(data), 64):
        pixels = torch.stack([data[i][0] for i in range(start, min(start + 64, len(data)))])
        written += greedy(pretrained.model, pixels, pretrained.tokenizer)
    return written


def _picture(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
