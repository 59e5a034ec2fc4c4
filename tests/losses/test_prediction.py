"""The cross-entropy of a prediction against torch's on float64 logits that are all held."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmpretrain import IGNORE_INDEX, InputError, Outputs, Prediction, PredictionLoss, prediction_loss
from mmpretrain.losses import prediction as module
from tests.losses.memory import allocations
from tests.losses.test_losses import agree


def prediction(rows: int, length: int, seed: int = 0, vocabulary: int = 11, width: int = 5, asked: float = 0.6):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, width, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) > asked] = IGNORE_INDEX
    return Prediction(hidden, weight, labels)


def reference(given: Prediction) -> torch.Tensor:
    logits = (given.hidden @ given.weight.T).flatten(0, -2).double()
    return F.cross_entropy(logits, given.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99), st.integers(1, 9), st.booleans())
def test_chunks_equal_all_logits(rows, length, seed, chunk_size, select):
    made = prediction(rows, length, seed)
    flat = made.hidden.flatten(0, 1), made.weight, made.labels.flatten()
    loss, _, _ = module.linear_cross_entropy(*flat, torch.float64, chunk_size, select, True)
    agree(2 * loss, 2 * reference(made), (made.hidden, made.weight), 1e-10)


def test_packed_positions_give_the_same():
    made = prediction(3, 5)
    packed = Prediction(made.hidden.flatten(0, 1), made.weight, made.labels.flatten())
    agree(prediction_loss(packed), prediction_loss(made), (made.hidden, made.weight), 1e-12)


@pytest.mark.parametrize("select", [False, True])
def test_what_stands_where_nothing_is_asked_does_not_matter(select):
    made = prediction(2, 4)
    hidden = made.hidden.detach().clone()
    hidden[made.labels == IGNORE_INDEX] = torch.nan
    flat = hidden.flatten(0, 1), made.weight.detach(), made.labels.flatten()
    loss, grad_hidden, grad_weight = module.linear_cross_entropy(*flat, torch.float64, 3, select, True)
    assert loss.item() == pytest.approx(reference(made).item())
    assert grad_weight.isfinite().all() and not grad_hidden[flat[2] == IGNORE_INDEX].any()


def test_nothing_asked_is_zero_with_zero_gradients():
    made = prediction(2, 3, asked=0.0)
    loss = PredictionLoss()(Outputs({}, torch.ones(1), None, {"caption": made}, {}))
    loss.backward()
    assert loss.item() == 0 and not made.hidden.grad.any() and not made.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_and_the_gradient_of_the_weight_are_float32_under_autocast(dtype):
    exact = prediction(8, 8, vocabulary=300, width=32)
    made = Prediction(*(x.detach().float().requires_grad_() for x in exact[:2]), exact.labels)
    with torch.autocast("cpu", dtype):
        loss = prediction_loss(made)
    loss.backward()
    assert loss.dtype == made.weight.grad.dtype == made.hidden.grad.dtype == torch.float32
    want = reference(exact)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=5e-3)
    for mine, theirs in ((made.hidden.grad, exact.hidden.grad), (made.weight.grad, exact.weight.grad)):
        assert (mine - theirs).norm() / theirs.norm() < 2e-2


def test_float64_stays_float64_under_autocast():
    made = prediction(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        agree(prediction_loss(made), reference(made), (made.hidden, made.weight), 1e-10)


def test_logits_are_never_held(monkeypatch):
    monkeypatch.setattr(module, "CPU_LOGITS", 8 * 1000)
    made = prediction(16, 16, vocabulary=1000, asked=1.0)
    largest, _ = allocations(lambda: prediction_loss(made).backward())
    assert largest <= 8 * 8 * 1000  # eight rows of logits, or the gradient of the weight; all of them are 256 rows
    with torch.no_grad():
        assert allocations(lambda: prediction_loss(made))[1] <= 5 * 8 * 8 * 1000


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    made = prediction(3, 4)
    given = Outputs({}, torch.ones(1), None, {"caption": made}, {})
    compiled = torch.compile(PredictionLoss(), backend="aot_eager", fullgraph=True)
    agree(compiled(given), PredictionLoss()(given), (made.hidden, made.weight), 1e-12)


def test_second_derivatives_are_refused_rather_than_wrong():
    made = prediction(3, 4)
    for of in (made.hidden, made.weight):
        with pytest.raises(InputError, match=r"create_graph=True; use torch's cross_entropy"):
            torch.autograd.grad(prediction_loss(made), of, create_graph=True)
