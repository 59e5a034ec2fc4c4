from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.text import bleu_score

from mmpretrain.evaluation import CiderD, bleu_4, bleu_counts

WORDS = ["a", "the", "cat", "dog", "red", "green", "sits", "runs", "on", "under", "grass", "big", "small"]


def corpus(pictures: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Captions, and 1 to 4 references for each, of which some resemble the caption."""
    generator = random.Random(seed)
    captions, references = [], []
    for i in range(pictures):
        first = generator.choices(WORDS, k=generator.randint(1, 12))
        own = []
        for _ in range(1 + i % 4):
            words = [word if generator.random() < 0.8 else generator.choice(WORDS) for word in first]
            own.append(" ".join(words[: generator.randint(1, 12)]))
        captions.append(" ".join(first))
        references.append(own)
    return captions, references


def counts(captions: list[str], references: list[list[str]]) -> np.ndarray:
    return np.array([bleu_counts(*pair) for pair in zip(captions, references, strict=True)], dtype=np.float64)


def test_bleu_is_that_of_torchmetrics() -> None:
    for seed in range(5):
        captions, references = corpus(30, seed)
        references = [sorted(own, key=lambda text: len(text.split())) for own in references]  # its way with ties
        assert bleu_4(counts(captions, references)) == pytest.approx(float(bleu_score(captions, references)), abs=1e-6)


def test_bleu_by_hand() -> None:
    # 5 words: 5/5, 4/4, 3/3, 2/2 of the second reference's, which is one longer: exp(1 - 6/5)
    found = counts(["A cat sits on grass."], [["dog", "a cat sits on grass now"]])
    assert found.tolist() == [[5, 4, 3, 2, 5, 4, 3, 2, 5, 6]]
    assert bleu_4(found) == pytest.approx(math.exp(-0.2))
    # "the" matches as often as one reference has it; of two equally near lengths the shorter counts
    assert bleu_counts("the the the", ["the", "the the cat dog a", "x y"])[0] == 2
    assert bleu_counts("the the the", ["the the cat dog", "x y"])[-1] == 2
    assert bleu_4(counts(["red green blue"], [["red green blue"]])) == 0  # no run of 4 words
    assert bleu_4(counts([""], [["a cat sits on"]])) == bleu_4(counts(["a"], [[""]])) == 0


def slow_cider(captions: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D from the formulas of the paper, one n at a time, with vectors over all runs of words there are."""

    def runs(text: str, n: int) -> Counter[str]:
        words = text.split()
        return Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = np.zeros(len(captions))
    for n in (1, 2, 3, 4):
        known = sorted({run for own in references for text in own for run in runs(text, n)})
        every = sorted({*known, *(run for text in captions for run in runs(text, n))})
        holds = [sum(any(run in runs(text, n) for text in own) for own in references) for run in every]
        idf = np.log(len(references)) - np.log(np.maximum(holds, 1))

        def vector(text: str, n: int = n, every: list[str] = every, idf: np.ndarray = idf) -> np.ndarray:
            return np.array([runs(text, n)[run] for run in every]) * idf

        for i, (caption, own) in enumerate(zip(captions, references, strict=True)):
            a = vector(caption)
            for text in own:
                b = vector(text)
                length = np.linalg.norm(a) * np.linalg.norm(b)
                cosine = (np.minimum(a, b) * b).sum() / length if length else 0.0
                difference = len(caption.split()) - len(text.split())
                scores[i] += 10 / len(own) / 4 * cosine * math.exp(-(difference**2) / 72)
    return scores.tolist()


def test_cider_is_the_papers_formula() -> None:
    captions, references = corpus(25)
    cider = CiderD(references)
    found = [cider.score(*pair) for pair in zip(captions, references, strict=True)]
    assert found == pytest.approx(slow_cider(captions, references), abs=1e-9)
    assert 0.5 < np.mean(found) < 10


def test_both_are_those_of_cocos_evaluation() -> None:
    theirs = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    captions, references = corpus(40)
    own, right = (dict(enumerate(values)) for values in ([[c] for c in captions], references))
    cider = CiderD(references)
    mean, each = theirs.compute_score(right, own)
    found = [cider.score(*pair) for pair in zip(captions, references, strict=True)]
    assert found == pytest.approx(each.tolist(), abs=1e-9)
    assert np.mean(found) == pytest.approx(mean)
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer").BleuScorer(n=4)
    for pair in zip(captions, references, strict=True):
        bleu += pair
    assert bleu_4(counts(captions, references)) == pytest.approx(bleu.compute_score(option="closest")[0][3], abs=1e-6)


sentences = st.lists(st.sampled_from("abc"), max_size=6).map(" ".join)


@given(caption=sentences, references=st.lists(sentences, min_size=1, max_size=3))
def test_a_perfect_caption_is_best(caption: str, references: list[str]) -> None:
    cider = CiderD([references, ["something else"]])
    assert 0 <= cider.score(caption, references) <= 10 + 1e-9
    assert 0 <= bleu_4(counts([caption], [references])) <= 1
    alone = CiderD([[caption], ["something else"]]).score(caption, [caption])
    assert alone == pytest.approx(2.5 * min(len(caption.split()), 4))


def test_one_picture_says_nothing_about_which_words_are_common() -> None:
    assert CiderD([["a cat"]]).score("a cat", ["a cat"]) == 0
