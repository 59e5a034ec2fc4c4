from __future__ import annotations

from functools import partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpretrain.errors import InputError
from mmpretrain.evaluation import Captioning, CiderD, bleu_4, bleu_counts, exact_match, rouge_l, wilson
from tests.evaluation.everything import nearest
from tests.evaluation.toy import COLOURS, Colours, pretrained

CAPTIONS = [["Red!"], ["a green thing", "green"], ["red"], ["red green"], ["x", "y z"], ["it is red"]]


def test_six_pictures_by_hand() -> None:
    # Written: red, green, blue, red, blue, red. F = 2 lcs / (words of both):
    # 1, 1 (the second reference), 0, 2/3, 0, 2/4.
    metrics = Captioning(partial(Colours, COLOURS, CAPTIONS), 9, nearest, batch_size=4)(pretrained())
    assert metrics["exact_match"] == 2 / 6
    assert (metrics["exact_match/ci_low"], metrics["exact_match/ci_high"]) == wilson(2, 6)
    assert metrics["rouge_l"] == pytest.approx((1 + 1 + 2 / 3 + 1 / 2) / 6)
    # Against the next picture's references: only the last (red, and A's reference) has a word in common.
    assert metrics["exact_match/chance"] == pytest.approx(1 / 6)
    assert metrics["rouge_l/chance"] == pytest.approx(1 / 6)
    assert metrics["rouge_l/ci_low"] < metrics["rouge_l"] < metrics["rouge_l/ci_high"]
    cider = CiderD(CAPTIONS)
    written = ["red", "green", "blue", "red", "blue", "red"]
    own = [cider.score(*pair) for pair in zip(written, CAPTIONS, strict=True)]
    assert metrics["cider"] == pytest.approx(sum(own) / 6)
    assert metrics["cider/chance"] == pytest.approx(cider.score("red", CAPTIONS[0]) / 6)
    assert metrics["cider/ci_low"] < metrics["cider"] < metrics["cider/ci_high"]
    assert metrics["bleu_4"] == metrics["bleu_4/ci_high"] == 0  # no four words in a row


def test_four_words_in_a_row() -> None:
    references = [["it is red and nothing else"], ["it is green and nothing else"], ["quite blue", "all in blue"]]
    data = partial(Colours, COLOURS[:3], references)
    metrics = Captioning(data, 9, lambda *_: ["It is red and nothing else."] * 3)(pretrained())
    counts = np.array([bleu_counts("it is red and nothing else", own) for own in references], dtype=float)
    assert 0 < metrics["bleu_4"] == bleu_4(counts)
    assert metrics["bleu_4/ci_low"] <= metrics["bleu_4"] <= metrics["bleu_4/ci_high"] == 1


sentences = st.lists(st.sampled_from("abc"), max_size=6)


@given(caption=sentences, reference=sentences)
def test_rouge_l_is_lins_definition(caption: list[str], reference: list[str]) -> None:
    def subsequences(words: list[str]) -> set[tuple[str, ...]]:
        return {c for size in range(len(words) + 1) for c in combinations(words, size)}

    longest = max(len(c) for c in subsequences(caption) & subsequences(reference))
    expected = 0.0
    if longest:
        precision, recall = longest / len(caption), longest / len(reference)
        expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(" ".join(caption), [" ".join(reference)]) == pytest.approx(expected)


def test_best_reference_and_words() -> None:
    assert rouge_l("the cat , sat .", ["no", "The cat sat"]) == 1
    assert rouge_l("", ["a"]) == rouge_l("a", ["?"]) == 0
    assert exact_match("A  cat .", ["dog", "a cat"]) == 1
    assert exact_match("Älg_ö", ["älg ö"]) == 1
    assert exact_match("cat a", ["a cat"]) == exact_match("!", ["?"]) == exact_match("", [""]) == 0


def test_bad_input() -> None:
    data = partial(Colours, COLOURS, [1] * 6)
    with pytest.raises(InputError, match="item 0 has the target 1"):
        Captioning(data, 9, nearest)(pretrained())
    with pytest.raises(InputError, match="wrote 0 captions for 6"):
        Captioning(data, 9, lambda *_: [])(pretrained())
    with pytest.raises(InputError, match="writes no captions"):  # greedy, and a model without a caption head
        Captioning(data)(pretrained())
    with pytest.raises(InputError, match="empty"):
        Captioning(partial(Colours, [], []), 9, nearest)(pretrained())
