"""What the report shows of a data set: answers to queries, worst mistakes, the similarity matrix, the map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.errors import InputError

QUERIES = 8  # text queries, pictures and generated captions shown
ANSWERS = 5  # best answers to each
MISTAKES = 6
MATRIX = 12  # pairs in the similarity matrix: as many columns as a phone is wide
MAP_PAIRS = 200


class Gallery(NamedTuple):
    """N pictures with M captions and their embeddings: image (N,E), text (M,E), any norm.

    `image_of_caption` gives each caption's picture (0..N-1); every picture has at least one caption.
    `generated` holds one caption per picture, or is None for a model that writes none. Ranks are among these
    N pictures and M captions; a few hundred to a few thousand of each are meant.
    """

    images: list[Image.Image]
    captions: list[str]
    image_of_caption: list[int]
    image_embeddings: Tensor
    text_embeddings: Tensor
    generated: list[str] | None


class Answer(NamedTuple):
    """One answer to a query: number of the picture or text, cosine similarity, whether it is right."""

    item: int
    score: float
    right: bool


class Query(NamedTuple):
    """A query (number of a text or picture), the rank of its best right answer (from 1), its best answers."""

    item: int
    rank: int
    answers: list[Answer]


class Mistake(NamedTuple):
    """A text query, its right picture, that picture's rank, and the wrong picture the model put first."""

    text: int
    rank: int
    right: Answer
    chosen: Answer


class Cell(NamedTuple):
    """One similarity: score, place (0..1) from lowest to highest shown, right pair, best of its row."""

    score: float
    heat: float
    right: bool
    best: bool


class Matrix(NamedTuple):
    """Similarities of a sample: a row per text, a column per picture."""

    texts: list[int]
    images: list[int]
    rows: list[list[Cell]]


class Map(NamedTuple):
    """Two principal components of pairs: image (K,2), text (K,2), variance shares, the centres' distance."""

    image: Tensor
    text: Tensor
    variance: tuple[float, float]
    gap: float


class Answers:
    """Every text ranked against every picture of a gallery, by cosine similarity.

    Equal captions are one text: each picture that carries the text is a right answer to it. Ties count
    against the right answer, so that a collapsed model does not look perfect. Raises InputError where the
    gallery does not fit together or an embedding is not finite.
    """

    def __init__(self, gallery: Gallery) -> None:
        check(gallery)
        first: dict[str, int] = {}  # text -> the first caption that is equal to it
        for position, caption in enumerate(gallery.captions):
            first.setdefault(caption, position)
        number = {text: index for index, text in enumerate(first)}
        self.texts = list(first)
        self.image = F.normalize(gallery.image_embeddings.detach().cpu().float(), dim=-1)
        self.text = F.normalize(gallery.text_embeddings.detach().cpu().float()[list(first.values())], dim=-1)
        self.scores = self.text @ self.image.T
        self.right = torch.zeros(self.scores.shape, dtype=torch.bool)
        self.right[[number[caption] for caption in gallery.captions], gallery.image_of_caption] = True
        self.texts_of_image = [column.nonzero().flatten().tolist() for column in self.right.T]

    def text_queries(self) -> list[Query]:
        """Texts spread evenly over the gallery, with the pictures found for them."""
        return _queries(spread(len(self.texts), QUERIES), self.scores, self.right)

    def picture_queries(self) -> list[Query]:
        """Pictures spread evenly over the gallery, with the texts found for them."""
        return _queries(spread(len(self.image), QUERIES), self.scores.T, self.right.T)

    def mistakes(self) -> list[Mistake]:
        """The text queries whose best right picture ranks lowest; empty where all find theirs first."""
        order = _ranking(self.scores, self.right)
        ranks = self.right.gather(1, order).int().argmax(dim=1)
        worst = ranks.argsort(descending=True, stable=True)[:MISTAKES].tolist()
        found = []
        for text in (text for text in worst if ranks[text] > 0):
            right, chosen = (int(order[text, place]) for place in (ranks[text], 0))
            found.append(
                Mistake(
                    text,
                    int(ranks[text]) + 1,
                    Answer(right, float(self.scores[text, right]), True),
                    Answer(chosen, float(self.scores[text, chosen]), False),
                )
            )
        return found

    def matrix(self) -> Matrix:
        """Similarities of a few pictures and the first caption of each."""
        images = spread(len(self.image), MATRIX)
        texts = list(dict.fromkeys(self.texts_of_image[image][0] for image in images))
        scores, right = self.scores[texts][:, images], self.right[texts][:, images]
        heat = (scores - scores.min()) / (scores.max() - scores.min()).clamp(min=1e-6)
        best = scores == scores.max(dim=1, keepdim=True).values
        columns = (part.tolist() for part in (scores, heat, right, best))
        return Matrix(texts, images, [[Cell(*cell) for cell in zip(*row)] for row in zip(*columns)])

    def map(self) -> Map:
        """Principal components of pictures and the first caption of each, both modalities together."""
        images = spread(len(self.image), MAP_PAIRS)
        image, text = self.image[images], self.text[[self.texts_of_image[image][0] for image in images]]
        gap = float((image.mean(dim=0) - text.mean(dim=0)).norm())
        points = torch.cat([image, text])
        points = points - points.mean(dim=0)
        _, singular, directions = torch.linalg.svd(points, full_matrices=False)
        # The sign of a direction is arbitrary: fix it, so that the same run always gives the same map.
        signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
        places = F.pad(points @ (directions * signs)[:2].T, (0, 2 - min(2, len(directions))))
        share = F.pad(singular.square() / singular.square().sum().clamp(min=1e-12), (0, 2))[:2].tolist()
        return Map(places[: len(images)], places[len(images) :], (share[0], share[1]), gap)


def spread(total: int, wanted: int) -> list[int]:
    """At most `wanted` indices below `total`, evenly spaced: the same ones every time."""
    if total <= wanted:
        return list(range(total))
    return [index * (total - 1) // (wanted - 1) for index in range(wanted)]


def _queries(chosen: Sequence[int], scores: Tensor, right: Tensor) -> list[Query]:
    """Answer the `chosen` rows of `scores`."""
    rows, hits = scores[chosen], right[chosen]
    order = _ranking(rows, hits)
    ranks = (hits.gather(1, order).int().argmax(dim=1) + 1).tolist()
    found = []
    for row, (index, rank) in enumerate(zip(chosen, ranks)):
        best = order[row, :ANSWERS].tolist()
        found.append(Query(index, rank, [Answer(b, float(rows[row, b]), bool(hits[row, b])) for b in best]))
    return found


def _ranking(scores: Tensor, right: Tensor) -> Tensor:
    """Columns of each row from the best score down, wrong answers first where scores are equal."""
    wrong_first = right.int().argsort(dim=1, stable=True)
    by_score = scores.gather(1, wrong_first).argsort(dim=1, descending=True, stable=True)
    return wrong_first.gather(1, by_score)


def check(gallery: Gallery) -> None:
    """Raise InputError where the parts of a gallery do not fit together."""
    pictures, captions = len(gallery.images), len(gallery.captions)
    if not pictures or not captions:
        raise InputError(
            f"the report's gallery has {pictures} pictures and {captions} captions; expected at least one "
            "of each: fill both, or give gallery=None for a report without pictures"
        )
    for name, embeddings, count in (
        ("image_embeddings", gallery.image_embeddings, pictures),
        ("text_embeddings", gallery.text_embeddings, captions),
    ):
        if embeddings.ndim != 2 or len(embeddings) != count:
            raise InputError(
                f"gallery.{name} has shape {tuple(embeddings.shape)}; expected ({count}, E): embed each "
                f"of the {pictures} pictures and {captions} captions once"
            )
        if bad := int((~embeddings.isfinite()).any(dim=1).sum()):
            raise InputError(
                f"gallery.{name} has {bad} of {count} rows that are not finite; expected numbers: look for a "
                "loss that diverged, or give gallery=None for a report without pictures"
            )
    if gallery.image_embeddings.shape[1] != gallery.text_embeddings.shape[1]:
        raise InputError(
            f"gallery embeddings have {gallery.image_embeddings.shape[1]} (image) and "
            f"{gallery.text_embeddings.shape[1]} (text) columns; expected one shared space: embed "
            "both with the same model"
        )
    if len(gallery.image_of_caption) != captions or set(gallery.image_of_caption) != set(range(pictures)):
        raise InputError(
            f"gallery.image_of_caption has {len(gallery.image_of_caption)} entries over "
            f"{len(set(gallery.image_of_caption))} pictures; expected {captions} entries, one per caption, "
            f"that name each picture 0..{pictures - 1} at least once: leave out pictures without captions"
        )
    if gallery.generated is not None and len(gallery.generated) != pictures:
        raise InputError(
            f"gallery.generated has {len(gallery.generated)} captions; expected {pictures}: write one for "
            "each picture, or give None"
        )
