"""Losses in tiles equal the plain ones in value and every gradient, and never hold the similarities."""

from __future__ import annotations

import open_clip.loss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmpretrain import ContrastiveLoss, InputError, MultiPositiveContrastiveLoss, Outputs, SigmoidLoss
from mmpretrain.losses import (
    contrastive_loss,
    multi_positive_contrastive_loss,
    ring_contrastive_loss,
    ring_sigmoid_loss,
    sigmoid_loss,
    tiled_contrastive_loss,
    tiled_sigmoid_loss,
)
from tests.losses.memory import allocations
from tests.losses.test_losses import agree, leaves
from tests.ranks import run_ranks

shapes = st.tuples(st.integers(1, 13), st.integers(1, 15), st.integers(0, 99))
scales = st.sampled_from([1.0, 14.0, 100.0, 1000.0])


def captions(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(-3, 3, (rows,), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(shapes, scales)
def test_tiles_equal_the_whole(shape, scale):
    rows, tile_size, seed = shape
    a, b, s, t = leaves(rows, seed=seed, scale=scale)
    agree(tiled_contrastive_loss(a, b, s, 0, tile_size), contrastive_loss(a, b, a, b, s), (a, b, s), 1e-10)
    agree(tiled_sigmoid_loss(a, b, s, t, 0, tile_size), sigmoid_loss(a, b, s, t), (a, b, s, t), 1e-10)
    same = captions(rows, seed)
    whole = multi_positive_contrastive_loss(a, b, a, b, s, same[:, None] == same)
    agree(tiled_contrastive_loss(a, b, s, 0, tile_size, same), whole, (a, b, s), 1e-10)


def far(rows: int, scale: float) -> list[torch.Tensor]:
    """Log-sum-exps up to 2 x scale apart: half of b is opposite to its own row of a, the other half next to it."""
    a, b, s, t = (x.detach() for x in leaves(rows, 4, scale=scale))
    b = torch.where(torch.arange(rows)[:, None] % 2 == 0, -a, F.normalize(a + 0.01 * b, dim=-1))
    return [x.requires_grad_() for x in (a, b, s, t)]


def errors(loss: torch.Tensor, inputs: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    """Largest errors of a loss and its gradients, relative to the largest entry wanted."""
    found = [loss.detach(), *torch.autograd.grad(loss, inputs)]
    return [float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)) for x, y in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("make", [far, lambda rows, scale: leaves(rows, 64, scale=scale)], ids=["far", "random"])
@pytest.mark.parametrize("scale", [1.0, 89.0, 100.0, 1000.0])
def test_float32_is_as_exact_in_tiles_as_whole(make, scale):
    exact = make(40, scale)
    a, b, s, _ = low = [x.detach().float().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in low]  # what float32 rounded is no error of a loss
    sides = [
        (
            3,
            contrastive_loss(*exact[:2], *exact[:2], exact[2]),
            contrastive_loss(a, b, a, b, s),
            tiled_contrastive_loss(a, b, s, 0, 7),
        ),
        (4, sigmoid_loss(*exact), sigmoid_loss(*low), tiled_sigmoid_loss(*low, 0, 7)),
    ]
    for count, reference, plain, tiled in sides:
        wanted = [reference.detach(), *torch.autograd.grad(reference, exact[:count])]
        for mine, theirs in zip(errors(tiled, low[:count], wanted), errors(plain, low[:count], wanted), strict=True):
            assert mine <= 4 * theirs + 1e-6


def test_open_clip_gives_the_same():
    a, b, s, t = leaves(33, 16, scale=100.0)
    agree(tiled_contrastive_loss(a, b, s, 0, 10), open_clip.loss.ClipLoss()(a, b, s), (a, b, s), 1e-6)
    agree(tiled_sigmoid_loss(a, b, s, t, 0, 10), open_clip.loss.SigLipLoss()(a, b, s, t), (a, b, s, t), 1e-6)


def test_a_gradient_is_weighed_and_may_be_asked_for_twice():
    a, b, s, t = leaves(9)
    for tiled, whole in (
        (tiled_contrastive_loss(a, b, s, 0, 4), contrastive_loss(a, b, a, b, s)),
        (tiled_sigmoid_loss(a, b, s, t, 0, 4), sigmoid_loss(a, b, s, t)),
    ):
        agree(3 * tiled, 3 * whole.clone(), (a, b, s), 1e-10)
        torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-10)


def outputs(rows: int, width: int) -> Outputs:
    a, b, s, t = (x.detach().float().requires_grad_() for x in leaves(rows, width, scale=100.0))
    return Outputs({"image": a, "text": b}, s, t, {}, {"text": captions(rows, 0)})


@pytest.mark.parametrize(
    "loss",
    [
        ContrastiveLoss(tile_size=64),
        ContrastiveLoss(tile_size=64, exchange="ring"),
        MultiPositiveContrastiveLoss(tile_size=64),
        MultiPositiveContrastiveLoss(tile_size=64, exchange="ring"),
        SigmoidLoss(tile_size=64),
        SigmoidLoss(tile_size=64, exchange="gather"),
    ],
)
def test_similarities_are_never_held(loss):
    rows, width = 1024, 8
    given = outputs(rows, width)
    largest, peak = allocations(lambda: loss(given).backward())
    # Without tiles one matrix alone has 4 MiB; the widest thing here is a gradient or a tile of 16 KiB.
    assert largest <= 4 * max(64 * 64, rows * width)
    assert peak <= 20 * 4 * max(64 * 64, rows * width)


def test_the_watch_on_memory_sees_the_plain_loss():
    given = outputs(1024, 8)
    a, b = given.embeddings.values()
    largest, _ = allocations(lambda: contrastive_loss(a, b, a, b, given.logit_scale).backward())
    assert largest == 4 * 1024 * 1024


@pytest.mark.parametrize("loss", [ContrastiveLoss(), MultiPositiveContrastiveLoss(), SigmoidLoss()])
def test_a_large_batch_is_tiled_by_itself(loss):
    given = outputs(1200, 4)
    largest, _ = allocations(lambda: loss(given).backward())
    assert largest <= 4 * 1024 * 1024 < 4 * 1200 * 1200


@pytest.mark.parametrize(
    "loss",
    [
        ContrastiveLoss(),
        ContrastiveLoss(tile_size=3),
        ContrastiveLoss(exchange="ring"),
        MultiPositiveContrastiveLoss(),
        MultiPositiveContrastiveLoss(tile_size=3),
        SigmoidLoss(),
        SigmoidLoss(tile_size=3, exchange="gather"),
    ],
)
def test_compiles_without_a_graph_break(loss):
    torch._dynamo.reset()
    given = outputs(8, 4)
    leaves_ = (*given.embeddings.values(), given.logit_scale)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    agree(compiled(given), loss(given), leaves_, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_never_reaches_a_tile(dtype):
    given = outputs(32, 64)
    a, b = (x.detach() for x in given.embeddings.values())
    s, t = given.logit_scale.detach(), given.logit_bias.detach()
    plain = tiled_contrastive_loss(a, b, s, 0, 8), tiled_sigmoid_loss(a, b, s, t, 0, 8)
    with torch.autocast("cpu", dtype):
        cast = tiled_contrastive_loss(a, b, s, 0, 8), tiled_sigmoid_loss(a, b, s, t, 0, 8)
    assert [x.item() for x in cast] == [x.item() for x in plain]
    low = tiled_contrastive_loss(a.to(dtype), b.to(dtype), s, 0, 8)
    assert low.dtype == torch.float32 and abs(low - plain[0]) < 0.1


def test_a_number_that_is_none_is_told_on():
    a, b, s, t = (x.detach() for x in leaves(6))
    a[2, 1] = torch.nan
    assert tiled_contrastive_loss(a, b, s, 0, 4).isnan() and tiled_sigmoid_loss(a, b, s, t, 0, 4).isnan()


@pytest.mark.parametrize("loss", [ContrastiveLoss, MultiPositiveContrastiveLoss, SigmoidLoss])
def test_what_no_tile_can_be_is_refused(loss):
    with pytest.raises(InputError, match="tile_size is 0"):
        loss(tile_size=0)
    with pytest.raises(InputError, match=r"'scatter'.*ring"):
        loss(exchange="scatter")


LOSSES = {
    "contrastive": lambda a, b, s, t: tiled_contrastive_loss(a, b, s, 0, 4),
    "ring contrastive": lambda a, b, s, t: ring_contrastive_loss(a, b, s, 4),
    "multi-positive": lambda a, b, s, t: tiled_contrastive_loss(a, b, s, 0, 4, captions(len(a), 0)),
    "sigmoid": lambda a, b, s, t: tiled_sigmoid_loss(a, b, s, t, 0, 4),
    "ring sigmoid": lambda a, b, s, t: ring_sigmoid_loss(a, b, s, t, 4),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_second_derivatives_are_refused_rather_than_wrong(loss):
    given = leaves(6)
    with pytest.raises(InputError, match=r"create_graph=True; use \w*(contrastive|sigmoid)_loss"):
        torch.autograd.grad(loss(*given), given[0], create_graph=True)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(("rows", "columns"), [(5, 6), (6, 5), (5, 10)])
def test_rows_without_their_column_are_refused(loss, rows, columns):
    a, _, s, t = leaves(rows)
    with pytest.raises(InputError, match=rf"{rows} rows .* {columns} columns, expected {rows}"):
        loss(a, leaves(columns)[1], s, t)


def test_identities_of_other_rows_are_refused():
    a, b, s, _ = leaves(6)
    for loss in (
        lambda ids: tiled_contrastive_loss(a, b, s, 0, 4, ids),
        lambda ids: ring_contrastive_loss(a, b, s, 4, ids),
    ):
        with pytest.raises(InputError, match="7 identities for 6 rows"):
            loss(captions(7, 0))


def refusals() -> list[str]:
    """What is said where the columns are this rank's alone, or too many for a ring."""
    a, b, s, t = leaves(4)
    twice = torch.cat([b, b])
    asked = [
        lambda: tiled_contrastive_loss(a, b, s),
        lambda: tiled_sigmoid_loss(a, b, s, t),
        lambda: ring_contrastive_loss(a, twice, s),
        lambda: ring_sigmoid_loss(a, twice, s, t),
        lambda: ring_contrastive_loss(a, b, s, None, captions(4, 0)),
    ]
    said = []
    for ask in asked:
        try:
            ask()
        except InputError as error:
            said.append(str(error))
        else:
            said.append("nothing")
    return said


def test_columns_of_other_ranks_are_missed():
    for said in run_ranks(refusals, 2):
        for message, part in zip(said, ["4 columns, expected 8"] * 2 + ["8 columns, expected 4"] * 2, strict=False):
            assert part in message and "4 rows on each of 2 ranks" in message
        assert "4 identities for 8 rows" in said[-1]


@pytest.mark.parametrize(
    "loss",
    [
        ContrastiveLoss(),
        ContrastiveLoss(tile_size=2),
        ContrastiveLoss(exchange="ring"),
        MultiPositiveContrastiveLoss(),
        SigmoidLoss(),
        SigmoidLoss(exchange="gather"),
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (4, 3)])
def test_modalities_that_are_no_pairs_are_refused(loss, rows, columns):
    a, b = outputs(rows, 4).embeddings["image"], outputs(columns, 4).embeddings["text"]
    given = outputs(rows, 4)._replace(embeddings={"image": a, "text": b})
    with pytest.raises(InputError, match=f"{rows} rows of 'image' and {columns} of 'text'"):
        loss(given)
