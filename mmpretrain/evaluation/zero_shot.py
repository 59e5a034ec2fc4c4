"""Zero-shot classification: a picture belongs to the class whose name's embedding is nearest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain.distributed import rank, sum_over_ranks, world_size
from mmpretrain.errors import InputError
from mmpretrain.evaluation.classification import check_ks, class_hits_of, classification_metrics, labels_of
from mmpretrain.evaluation.embed import DataFactory, check_finite, embed_texts, similarities
from mmpretrain.evaluation.features import image_features
from mmpretrain.evaluation.multi_label import mean_average_precision, multi_hot
from mmpretrain.evaluation.templates import GENERAL
from mmpretrain.types import Tokenizer

if TYPE_CHECKING:
    from mmpretrain.model import MultimodalModel
    from mmpretrain.pretrained import Pretrained


def zero_shot_classifier(
    model: MultimodalModel,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[str] = GENERAL,
    batch_size: int = 256,
) -> Tensor:
    """Embed K class names to (K,E): the mean over templates of unit vectors, made a unit vector again.

    Raises `InputError` where there are no class names or templates, or a template lacks its `{}`.
    Source: Radford et al. 2021, section 3.1.4.
    """
    if not class_names or not templates:
        raise InputError(
            f"{len(class_names)} class names and {len(templates)} templates; expected at least one of each"
        )
    for template in templates:
        if "{}" not in template:
            raise InputError(f"template {template!r} has no place for the class name; write {{}} where it belongs")
    # Not str.format: a brace inside a class name or template is text, not a field to look up.
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    embeddings = embed_texts(model, tokenizer, texts, batch_size)
    return F.normalize(embeddings.view(len(class_names), len(templates), -1).mean(dim=1), dim=-1)


def class_hits(
    images: Tensor,
    classifier: Tensor,
    labels: Tensor,
    ks: Sequence[int],
    chunk_size: int = 1024,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Count per class, over all ranks: top-k hits (len(ks),K) and samples (K,).

    A hit has its label among the k nearest classes; ties count against the model. images (N,E), classifier (K,E),
    labels (N,) int64 in [0, K), the same on every rank; each rank scores its share, which may be empty, in chunks.
    Classes with equal `names` have one score and stay in their order: ImageNet's list has two such pairs, of which all
    published numbers take the first. Raises `InputError` where an embedding is not finite.
    """
    classes = len(classifier)
    check_finite(images)
    check_finite(classifier)
    mine, own = images[rank() :: world_size()], labels.to(images.device)[rank() :: world_size()]
    totals = torch.zeros(len(ks), classes, dtype=torch.int64, device=images.device)
    first, behind = _namesakes(names or [], images.device)
    for chunk, label in zip(torch.split(mine, chunk_size), torch.split(own, chunk_size), strict=True):
        scores = similarities(chunk, classifier)
        if first is not None:
            scores = scores[:, first]
        totals += class_hits_of(scores, label, ks, behind)
    return sum_over_ranks(totals), torch.bincount(labels, minlength=classes)


class ZeroShotClassification:
    """Evaluator: `top1`, `top5` and `mean_class_recall` of a data set of (image, int label).

    Where a picture has several classes, its target a 0 or 1 for each, it is `mean_average_precision` instead.
    `class_names[i]` names label i; None takes the data set's own `classes`. `templates` None takes the data set's own
    `templates`, or `GENERAL` where it has none. See `classification_metrics` and `mean_average_precision` for
    intervals and chance.
    """

    def __init__(
        self,
        data: DataFactory,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        ks: Sequence[int] = (1, 5),
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        self.data = data
        self.class_names = None if class_names is None else list(class_names)
        self.templates = None if templates is None else list(templates)
        self.ks = check_ks(ks)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __call__(self, pretrained: Pretrained) -> dict[str, float]:
        """Classify every picture; the same numbers on every rank."""
        model, tokenizer = pretrained.model, pretrained.tokenizer
        data = self.data(transform=pretrained.preprocess)
        names = _names(self.class_names, getattr(data, "classes", None))
        templates = (getattr(data, "templates", None) or GENERAL) if self.templates is None else self.templates
        images, targets = image_features(model, data, self.batch_size, self.num_workers)
        classifier = zero_shot_classifier(model, tokenizer, names, templates, self.batch_size)
        sizes = {"images": float(len(targets)), "classes": float(len(names))}
        if isinstance(targets[0], list):
            return sizes | mean_average_precision(images, classifier, multi_hot(targets, len(names)))
        labels = labels_of(targets, len(names)).to(images.device)
        # Top-1 goes first whatever `ks` says: mean per class recall needs it.
        hits, counts = class_hits(images, classifier, labels, (1, *self.ks), names=names)
        return sizes | classification_metrics(hits, counts, self.ks)


def _namesakes(names: Sequence[str], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Say of each class which is the first of its name, and how many of its name come after it; None if none does."""
    if len(set(names)) == len(names):
        return None, None
    place: dict[str, int] = {}
    first = [place.setdefault(name, number) for number, name in enumerate(names)]
    left, behind = Counter(names), []
    for name in names:
        left[name] -= 1
        behind.append(left[name])
    return torch.tensor(first, device=device), torch.tensor(behind, device=device)


def _names(given: list[str] | None, own: Any) -> list[str]:
    labels: list[str] | None = None
    if own is not None and all(isinstance(name, str) for name in own):
        labels = list(own)
    if given is None:
        if not labels:
            raise InputError("the data set does not name its classes; give `class_names`, in the order of its labels")
        return labels
    # Equal names in another order are the silent mistake: every number would be wrong and none would look it.
    if labels is not None and (len(labels) != len(given) or (sorted(labels) == sorted(given) and labels != given)):
        raise InputError(
            f"class_names are {given[:3]}… ({len(given)}), but the data set's labels stand for "
            f"{labels[:3]}… ({len(labels)}); "
            "give one name per label, in the data set's order"
        )
    return given
