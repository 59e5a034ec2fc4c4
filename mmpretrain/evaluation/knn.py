"""k nearest neighbours: a picture belongs to the class of the training pictures it is nearest to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain.distributed import rank, sum_over_ranks, world_size
from mmpretrain.errors import InputError
from mmpretrain.evaluation.classification import check_ks, class_hits_of, classification_metrics, labels_of
from mmpretrain.evaluation.embed import DataFactory, check_finite, similarities
from mmpretrain.evaluation.features import Features, check_features, image_features
from mmpretrain.evaluation.train_split import class_count

if TYPE_CHECKING:
    from mmpretrain.pretrained import Pretrained


def nearest(queries: Tensor, bank: Tensor, k: int, tile_size: int = 16384) -> tuple[Tensor, Tensor]:
    """Find the k rows of `bank` (N,E) most similar to each query (Q,E): similarities falling (Q,k), indices (Q,k).

    Memory beyond the embeddings is Q x (tile_size + k). Raises `InputError` where the bank has fewer than k rows.
    """
    if len(bank) < k:
        raise InputError(f"{k} neighbours of {len(bank)} pictures; expected at most as many as there are")
    scores = queries.new_empty((len(queries), 0), dtype=torch.float32)
    indices = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), tile_size):
        found = similarities(queries, bank[start : start + tile_size])
        best, places = found.topk(min(k, found.shape[1]), dim=1)
        scores, indices = torch.cat([scores, best], dim=1), torch.cat([indices, places + start], dim=1)
        scores, kept = scores.topk(min(k, scores.shape[1]), dim=1)
        indices = indices.gather(1, kept)
    return scores, indices


def votes(scores: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Add up exp(similarity / temperature) of each query's neighbours by class: (Q,k), labels (Q,k) -> (Q,classes).

    Float64 on the CPU, where sums do not depend on the order that threads take; relative to the nearest neighbour's.
    """
    scores = scores.cpu().double()
    weights = ((scores - scores[:, :1]) / temperature).exp()
    return torch.zeros(len(scores), classes, dtype=torch.float64).scatter_add_(1, labels.cpu(), weights)


class NearestNeighbours:
    """Evaluator: `<k>nn/top1`, `<k>nn/top5` and `<k>nn/mean_class_recall` for each k of `neighbours`.

    The k training pictures most similar to a picture vote for their class with the weight exp(similarity /
    temperature). `train` and `data` are data sets of (image, int label). `features` "pooled" are made unit vectors.
    More neighbours than training pictures are all of them. A class without a vote is never a hit; ties count against
    the model. Source: Wu et al. 2018, with the numbers of DINO (Caron et al. 2021).
    """

    def __init__(
        self,
        train: DataFactory,
        data: DataFactory,
        neighbours: Sequence[int] = (20, 200),
        temperature: float = 0.07,
        ks: Sequence[int] = (1, 5),
        features: Features = "embedding",
        batch_size: int = 256,
        num_workers: int = 0,
        chunk_size: int = 256,
    ) -> None:
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}; expected a number above 0, such as 0.07")
        check_features(features)
        self.train = train
        self.data = data
        self.neighbours = check_ks(neighbours, "neighbours")
        self.temperature = temperature
        self.ks = check_ks(ks)
        self.features: Features = features
        self.batch_size = batch_size
        self.num_workers = num_workers
        (self.chunk_size,) = check_ks([chunk_size], "chunk_size")

    def __call__(self, pretrained: Pretrained) -> dict[str, float]:
        """Classify every picture of `data`; the same numbers on every rank."""
        train_data, data = (build(transform=pretrained.preprocess) for build in (self.train, self.data))
        known, images = (
            image_features(pretrained.model, part, self.batch_size, self.num_workers, self.features)
            for part in (train_data, data)
        )
        classes = class_count(train_data, data, known.targets, images.targets)
        bank_labels, labels = labels_of(known.targets, classes), labels_of(images.targets, classes)
        bank, queries = (F.normalize(check_finite(part.embeddings), dim=-1) for part in (known, images))
        hits = torch.zeros(len(self.neighbours), 1 + len(self.ks), classes, dtype=torch.int64)
        most = min(max(self.neighbours), len(bank))
        # Shared out by chunk, not by row: every chunk is the same product of matrices whatever the ranks.
        for start in range(rank() * self.chunk_size, len(queries), world_size() * self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            scores, indices = nearest(queries[chunk], bank, most)
            near = bank_labels[indices.cpu()]
            for row, k in enumerate(self.neighbours):
                found = votes(scores[:, :k], near[:, :k], classes, self.temperature)
                hits[row] += class_hits_of(found, labels[chunk], (1, *self.ks))
        hits = sum_over_ranks(hits.to(queries.device)).cpu()
        counts = torch.bincount(labels, minlength=classes)
        results = {"images": float(len(labels)), "train_images": float(len(bank)), "classes": float(classes)}
        for row, k in enumerate(self.neighbours):
            found_at = classification_metrics(hits[row], counts, self.ks)
            results |= {f"{k}nn/{name}": value for name, value in found_at.items()}
        return results
