"""Retrieval between pictures and captions, without ever holding the matrix of all similarities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmpretrain.distributed import rank, sum_over_ranks, world_size
from mmpretrain.errors import InputError
from mmpretrain.evaluation.classification import check_ks
from mmpretrain.evaluation.confidence import chance_recall, metric, wilson
from mmpretrain.evaluation.embed import DataFactory, check_finite, embed_texts, similarities
from mmpretrain.evaluation.features import image_features

if TYPE_CHECKING:
    from mmpretrain.pretrained import Pretrained

TIE = 1e-6
"""Similarities closer than this are equal: float32 does not tell them apart reliably."""


def rank_of_best(
    queries: Tensor,
    candidates: Tensor,
    positives: Sequence[Sequence[int]],
    chunk_size: int = 256,
    tile_size: int = 16384,
) -> Tensor:
    """Count each query's wrong candidates at least as similar as its best positive: (Q,) int64, 0 is best.

    queries (Q,E) and candidates (M,E) are unit vectors; `positives[q]` holds the indices of the candidates
    that are right for query q, so `rank < k` means that any of them is among the first k. Ties count against
    the model (within `TIE`, so that neither rounding nor the order of candidates decides, and a model that
    embeds everything alike scores 0). Memory beyond the embeddings is chunk_size x tile_size, whatever Q and M.

    Raises `InputError` where a query has no positive, an index is out of range, or an embedding is not
    finite.
    """
    if len(positives) != len(queries):
        raise InputError(f"{len(positives)} lists of positives for {len(queries)} queries; expected one for each")
    check_finite(queries)
    check_finite(candidates)
    for query, own in enumerate(positives):
        if not own or min(own) < 0 or max(own) >= len(candidates):
            raise InputError(f"query {query} has positives {list(own)}; expected indices below {len(candidates)}")
    ranks = [queries.new_empty(0, dtype=torch.int64)]
    for start in range(0, len(queries), chunk_size):
        chunk = queries[start : start + chunk_size]
        right = enumerate(positives[start : start + chunk_size])
        pairs = [(row, column) for row, columns in right for column in columns]
        rows, columns = torch.tensor(pairs, device=queries.device).T
        best = _best_of(chunk, candidates, rows, columns)
        found = torch.zeros(len(chunk), dtype=torch.int64, device=queries.device)
        for first in range(0, len(candidates), tile_size):
            scores = similarities(chunk, candidates[first : first + tile_size])
            # Positives are struck out in place: a mask of the whole tile would double its memory.
            here = (columns >= first) & (columns < first + tile_size)
            scores[rows[here], columns[here] - first] = -torch.inf
            found += (scores >= best[:, None] - TIE).sum(dim=1)
        ranks.append(found)
    return torch.cat(ranks)


def _best_of(queries: Tensor, candidates: Tensor, rows: Tensor, columns: Tensor, most: int = 16384) -> Tensor:
    """Return each query's similarity with the nearest of its positives, given as pairs (row, column): (Q,) float32."""
    best = torch.full((len(queries),), -torch.inf, device=queries.device)
    for row, column in zip(torch.split(rows, most), torch.split(columns, most), strict=True):
        with torch.autocast(queries.device.type, enabled=False):
            scores = (queries[row].float() * candidates[column].float()).sum(dim=1)
        best.scatter_reduce_(0, row, scores, "amax")
    return best


class Retrieval:
    """Evaluator: `image_to_text/recall@k` and `text_to_image/recall@k` of (image, list of captions).

    A query is found at k if any of its positives is among the k nearest candidates. Each caption is one text
    query. Intervals are Wilson's over queries; captions of one picture resemble each other, so with several
    of them the text-to-image interval is somewhat narrow. Chance is that of a random order of the candidates.
    """

    def __init__(
        self, data: DataFactory, ks: Sequence[int] = (1, 5, 10), batch_size: int = 256, num_workers: int = 0
    ) -> None:
        self.data = data
        self.ks = check_ks(ks)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __call__(self, pretrained: Pretrained) -> dict[str, float]:
        """Rank captions for every picture and pictures for every caption; the same numbers on every rank."""
        data = self.data(transform=pretrained.preprocess)
        images = image_features(pretrained.model, data, self.batch_size, self.num_workers)
        captions = captions_of(images.targets)
        owners = [picture for picture, own in enumerate(captions) for _ in own]
        of_picture: list[list[int]] = [[] for _ in captions]
        for caption, picture in enumerate(owners):
            of_picture[picture].append(caption)
        flat = [caption for own in captions for caption in own]
        texts = embed_texts(pretrained.model, pretrained.tokenizer, flat, self.batch_size)
        return {
            "images": float(len(captions)),
            "captions": float(len(owners)),
            **self._recalls("image_to_text", images.embeddings, texts, of_picture),
            **self._recalls("text_to_image", texts, images.embeddings, [[picture] for picture in owners]),
        }

    def _recalls(
        self, name: str, queries: Tensor, candidates: Tensor, positives: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        mine = slice(rank(), None, world_size())
        ranks = rank_of_best(queries[mine], candidates, positives[mine])
        hits = sum_over_ranks(torch.stack([(ranks < k).sum() for k in self.ks])).tolist()
        results: dict[str, float] = {}
        for k, hit in zip(self.ks, hits, strict=True):
            chance = sum(chance_recall(k, len(right), len(candidates)) for right in positives) / len(positives)
            results |= metric(f"{name}/recall@{k}", hit / len(positives), wilson(hit, len(positives)), chance)
        return results


def captions_of(targets: Sequence[Any]) -> list[list[str]]:
    """Check that every target is a list of captions, or one caption; raises `InputError` if not."""
    captions = []
    for index, target in enumerate(targets):
        own = [target] if isinstance(target, str) else target
        if not isinstance(own, list) or not own or not all(isinstance(c, str) and c.strip() for c in own):
            raise InputError(
                f"item {index} has the target {target!r}; expected its captions, a list of texts: "
                "use a data set of captions, or leave pictures without a caption out"
            )
        captions.append(own)
    return captions
