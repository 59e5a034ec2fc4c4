from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmpretrain.errors import InputError
from mmpretrain.evaluation import Retrieval, rank_of_best, wilson
from tests.evaluation.toy import COLOURS, Colours, pretrained

CAPTIONS = [["red"], ["green", "red red green"], ["blue"], ["red green"], ["green blue blue"], ["red"]]
SIX = partial(Colours, COLOURS, CAPTIONS)


def test_six_pictures_by_hand() -> None:
    # Ranks, ties against the model. Captions: red 0, green 0, red red green 3 (D, A, F lead B), blue 0,
    # red green 0, green blue blue 0, the second red 2 (A leads, D ties). Pictures: A 1 (the other red ties),
    # B 0 (by either caption), C 0, D 1 (red red green leads), E 0, F 1 (the other red ties).
    metrics = Retrieval(SIX, ks=(1, 2, 3, 10), batch_size=4)(pretrained())
    assert metrics["images"] == 6
    assert metrics["captions"] == 7
    found = {k: v for k, v in metrics.items() if k.partition("@")[2].isdigit()}
    assert found == {
        "text_to_image/recall@1": 5 / 7,
        "text_to_image/recall@2": 5 / 7,
        "text_to_image/recall@3": 6 / 7,
        "text_to_image/recall@10": 1.0,
        "image_to_text/recall@1": 3 / 6,
        "image_to_text/recall@2": 1.0,
        "image_to_text/recall@3": 1.0,
        "image_to_text/recall@10": 1.0,
    }
    assert metrics["text_to_image/recall@1/chance"] == pytest.approx(1 / 6)
    # five pictures have one of seven captions, B has two
    assert metrics["image_to_text/recall@1/chance"] == pytest.approx((5 * 1 / 7 + 2 / 7) / 6)
    assert metrics["image_to_text/recall@10/chance"] == 1
    interval = (metrics["image_to_text/recall@1/ci_low"], metrics["image_to_text/recall@1/ci_high"])
    assert interval == wilson(3, 6)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Small whole numbers: float32 adds them exactly, and ties are many."""
    width, queries, candidates = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    row = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    a = draw(st.lists(row, min_size=queries, max_size=queries))
    b = draw(st.lists(row, min_size=candidates, max_size=candidates))
    right = st.lists(st.integers(0, candidates - 1), min_size=1, max_size=candidates)
    positives = draw(st.lists(right, min_size=queries, max_size=queries))
    return torch.tensor(a).float(), torch.tensor(b).float(), positives


@settings(deadline=None)
@given(problem=problems(), chunk_size=st.integers(1, 10), tile_size=st.integers(1, 10))
def test_rank_of_best_is_that_of_the_full_matrix(
    problem: tuple[Tensor, Tensor, list[list[int]]], chunk_size: int, tile_size: int
) -> None:
    queries, candidates, positives = problem
    expected = []
    for query, right in zip(queries.tolist(), positives, strict=True):
        scores = [sum(x * y for x, y in zip(query, c, strict=True)) for c in candidates.tolist()]
        # the place of the first positive when wrong candidates come first among equals
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i in right))
        expected.append(next(place for place, i in enumerate(order) if i in right))
    assert rank_of_best(queries, candidates, positives, chunk_size, tile_size).tolist() == expected


def test_ties_survive_rounding_and_autocast() -> None:
    """1000 copies of the positive: whatever rounding does, all of them count against it."""
    drawn = torch.randn(4, 513, generator=torch.Generator().manual_seed(0))
    row, query = torch.split(torch.nn.functional.normalize(drawn, dim=-1), [1, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rank_of_best(query, row.expand(1001, -1), [[5]] * 3).tolist() == [1000] * 3


def test_scores_in_float32_under_autocast() -> None:
    # bfloat16 cannot tell these similarities (1 and 0.999) apart
    candidates = torch.tensor([[0.999, 0.0447], [1.0, 0.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rank_of_best(torch.tensor([[1.0, 0.0]]), candidates, [[1]]).tolist() == [0]


class Largest(TorchDispatchMode):
    """Remember the most elements any operation's result had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.most = max(self.most, out.numel())
        return out


def test_no_tensor_grows_with_queries_times_candidates() -> None:
    queries, candidates = torch.rand(500, 4), torch.rand(300, 4)
    with Largest() as largest:
        rank_of_best(queries, candidates, [[i % 300] for i in range(500)], chunk_size=16, tile_size=200)
    assert largest.most == 16 * 200


@pytest.mark.parametrize("captions", [3, [], [""], [3], None])
def test_missing_captions(captions: object) -> None:
    with pytest.raises(InputError, match="item 2 has the target"):
        Retrieval(partial(Colours, COLOURS[:3], [["red"], "green", captions]))(pretrained())


def test_bad_positives_and_embeddings() -> None:
    a, b = torch.eye(2), torch.eye(3)[:, :2]
    for positives in ([[0]], [[0], []], [[0], [3]], [[0], [-1]]):
        with pytest.raises(InputError, match="positives"):
            rank_of_best(a, b, positives)
    with pytest.raises(InputError, match="NaN"):
        rank_of_best(a * torch.nan, b, [[0], [1]])
    with pytest.raises(InputError, match="ks is"):
        Retrieval(SIX, ks=(0,))


@pytest.mark.parametrize("captions", [1, 3])
def test_recall_is_clip_benchmarks(captions: int) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    generator = torch.Generator().manual_seed(captions)
    images = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=-1)
    noise = torch.randn(40 * captions, 6, generator=generator)
    texts = torch.nn.functional.normalize(images.repeat_interleave(captions, 0) + 0.8 * noise, dim=-1)
    owners = torch.arange(40).repeat_interleave(captions)
    positive = torch.zeros(len(texts), 40, dtype=torch.bool)
    positive[torch.arange(len(texts)), owners] = True
    scores = texts @ images.T
    of_picture = [[caption for caption, owner in enumerate(owners.tolist()) if owner == i] for i in range(40)]
    for k in (1, 5, 10):
        found = (rank_of_best(texts, images, [[owner] for owner in owners.tolist()], 7, 16) < k).double().mean()
        expected = (theirs.recall_at_k(scores, positive, k) > 0).double().mean()
        assert found == pytest.approx(float(expected), abs=1e-6)
        found = (rank_of_best(images, texts, of_picture, 7, 16) < k).double().mean()
        expected = (theirs.recall_at_k(scores.T, positive.T, k) > 0).double().mean()
        assert 0 < found < 1
        assert found == pytest.approx(float(expected), abs=1e-6)
