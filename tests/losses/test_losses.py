"""Losses against float64 loops written from the formulas, and against open_clip's."""

from __future__ import annotations

import math

import open_clip.loss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmpretrain import (
    IGNORE_INDEX,
    ContrastiveLoss,
    InputError,
    MultiPositiveContrastiveLoss,
    Outputs,
    Prediction,
    PredictionLoss,
    SigmoidLoss,
    contrastive_loss,
    multi_positive_contrastive_loss,
    prediction_loss,
    ring_sigmoid_loss,
    sigmoid_loss,
)


def leaves(rows: int, width: int = 8, seed: int = 0, scale: float = 14.0, bias: float = -5.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=-1) for _ in "ab")
    values = [a, b, torch.tensor([scale], dtype=torch.float64), torch.tensor([bias], dtype=torch.float64)]
    return [value.requires_grad_() for value in values]


def softmax_by_hand(a, b, scale):
    total = 0.0
    for i in range(len(a)):
        row = [scale[0] * torch.dot(a[i], b[j]) for j in range(len(b))]
        column = [scale[0] * torch.dot(b[i], a[j]) for j in range(len(a))]
        for logits in (row, column):
            total = total - (logits[i] - torch.logsumexp(torch.stack(logits), 0))
    return total / (2 * len(a))


def sigmoid_by_hand(a, b, scale, bias):
    total = 0.0
    for i in range(len(a)):
        for j in range(len(b)):
            z = scale[0] * torch.dot(a[i], b[j]) + bias[0]
            total = total + torch.log1p(torch.exp(-z if i == j else z))
    return total / len(a)


def agree(ours, theirs, inputs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    mine = torch.autograd.grad(ours, inputs, retain_graph=True)
    reference = torch.autograd.grad(theirs, inputs)
    for got, want in zip(mine, reference, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.floats(1, 100), st.integers(0, 99))
def test_contrastive_equals_the_formula(rows, scale, seed):
    a, b, s, _ = leaves(rows, seed=seed, scale=scale)
    agree(contrastive_loss(a, b, a, b, s), softmax_by_hand(a, b, s), (a, b, s), 1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.floats(1, 100), st.floats(-12, 0), st.integers(0, 99))
def test_sigmoid_equals_the_formula(rows, scale, bias, seed):
    a, b, s, t = leaves(rows, seed=seed, scale=scale, bias=bias)
    agree(sigmoid_loss(a, b, s, t), sigmoid_by_hand(a, b, s, t), (a, b, s, t), 1e-9)


@pytest.mark.parametrize("tile_size", [None, 1, 3, 7, 100])
def test_tiled_sigmoid_equals_untiled(tile_size):
    a, b, s, t = leaves(7)
    agree(ring_sigmoid_loss(a, b, s, t, tile_size), sigmoid_loss(a, b, s, t), (a, b, s, t), 1e-12)


def test_sigmoid_of_random_unit_vectors_at_the_start_is_near_ten():
    a, b, s, t = leaves(64, 512, scale=10.0, bias=-10.0)
    assert abs(sigmoid_loss(a, b, s, t).item() - 10.0) < 0.5


def test_sigmoid_is_divided_by_the_batch_not_its_square():
    a, b, s, t = leaves(16)
    pairs = sigmoid_by_hand(a, b, s, t) * 16
    assert sigmoid_loss(a, b, s, t).item() == pytest.approx(pairs.item() / 16)


def test_contrastive_agrees_with_open_clip():
    a, b, s, _ = (x.detach().float().requires_grad_() for x in leaves(32, 16))
    agree(contrastive_loss(a, b, a, b, s), open_clip.loss.ClipLoss()(a, b, s), (a, b, s), 1e-6)


def test_sigmoid_agrees_with_open_clip():
    a, b, s, t = (x.detach().double().requires_grad_() for x in leaves(32, 16))
    agree(ring_sigmoid_loss(a, b, s, t), open_clip.loss.SigLipLoss()(a, b, s, t), (a, b, s, t), 1e-6)


def test_weighted_sum_agrees_with_open_clips_coca_loss():
    a, b, s, _ = leaves(6, 16)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 5, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(1, 11, (6, 5), generator=generator)
    labels[2, 3:], labels[4, 1:] = 0, 0  # open_clip marks padding by id 0
    reference = open_clip.loss.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)
    theirs = sum(reference(a, b, hidden @ weight.T, labels, s))
    outputs = Outputs(
        {"image": a, "text": b},
        s,
        None,
        {"caption": Prediction(hidden, weight, labels.masked_fill(labels == 0, IGNORE_INDEX))},
        {},
    )
    ours = ContrastiveLoss()(outputs) + 2 * PredictionLoss()(outputs)
    agree(ours, theirs, (a, b, s, hidden, weight), 1e-6)


def test_prediction_loss_equals_a_manual_loop_and_ignores_padding():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    labels = torch.tensor([[1, 2, IGNORE_INDEX, IGNORE_INDEX], [0, 6, 3, IGNORE_INDEX], [5, 5, 5, 5]])
    total = 0.0
    for row in range(3):
        for column in range(4):
            if labels[row, column] != IGNORE_INDEX:
                logits = [math.fsum((hidden[row, column] * weight[v]).tolist()) for v in range(7)]
                total -= logits[labels[row, column]] - math.log(math.fsum(map(math.exp, logits)))
    assert prediction_loss(Prediction(hidden, weight, labels)).item() == pytest.approx(total, abs=1e-12)


def test_id_zero_is_a_label_like_any_other():
    hidden, weight = torch.zeros(1, 1, 2), torch.zeros(4, 2)
    loss = prediction_loss(Prediction(hidden, weight, torch.zeros(1, 1, dtype=torch.long)))
    assert loss.item() == pytest.approx(math.log(4))


def test_multi_positive_with_one_positive_is_contrastive():
    a, b, s, _ = leaves(6)
    one = multi_positive_contrastive_loss(a, b, a, b, s, torch.eye(6, dtype=torch.bool))
    agree(one, contrastive_loss(a, b, a, b, s), (a, b, s), 1e-12)


def test_multi_positive_shares_the_probability_among_equal_captions():
    a, b, s, _ = leaves(4)
    identities = {"text": torch.tensor([7, 8, 7, 9])}
    ours = MultiPositiveContrastiveLoss()(Outputs({"image": a, "text": b}, s, None, {}, identities))
    log_a, log_b = ((s * x @ y.T).detach().log_softmax(1) for x, y in ((a, b), (b, a)))
    positives = [[0, 2], [1], [0, 2], [3]]
    want = -sum(
        sum(float(log[i, j]) for j in right) / len(right) for log in (log_a, log_b) for i, right in enumerate(positives)
    )
    assert ours.item() == pytest.approx(want / 8, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_similarities(dtype):
    a, b, _, t = (x.detach().float() for x in leaves(32, 64))
    s = torch.tensor([100.0])
    plain = contrastive_loss(a, b, a, b, s), ring_sigmoid_loss(a, b, s, t)
    with torch.autocast("cpu", dtype):
        cast = contrastive_loss(a, b, a, b, s), ring_sigmoid_loss(a, b, s, t)
    assert [x.item() for x in cast] == [x.item() for x in plain]


def test_scale_one_hundred_and_beyond_stays_finite():
    a, _, _, t = (x.detach().float() for x in leaves(8, 4))
    for scale in (89.0, 100.0, 1000.0):
        s = torch.tensor([scale], requires_grad=True)
        for loss in (contrastive_loss(a, a, a, a, s), ring_sigmoid_loss(a, a, s, t)):
            loss.backward()
            assert loss.isfinite() and s.grad.isfinite().all()


def test_wrong_models_are_told_what_to_change():
    a, b, s, _ = leaves(2)
    outputs = Outputs({"image": a, "audio": b}, s, None, {}, {})
    with pytest.raises(InputError, match=r"\['text'\].*audio"):
        ContrastiveLoss()(outputs)
    with pytest.raises(InputError, match="logit_bias=-10"):
        SigmoidLoss("image", "audio")(outputs)
    with pytest.raises(InputError, match=r"model\.heads"):
        PredictionLoss()(outputs)
    with pytest.raises(InputError, match="same"):
        MultiPositiveContrastiveLoss("image", "audio")(outputs)
    with pytest.raises(InputError, match="tile_size is 0"):
        SigmoidLoss(tile_size=0)
