"""What ranks send: predictions against what the kernel counts at the sockets of real gloo processes."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpretrain.losses import ContrastiveLoss, MultiPositiveContrastiveLoss, PredictionLoss, SigmoidLoss
from mmpretrain.planning.loss_cost import LossCost, Place, contrastive, loss_costs, sigmoid
from mmpretrain.planning.measure import Asked, ModelCost
from mmpretrain.planning.traffic import GRADIENTS, Message, Ranks, ddp
from mmpretrain.planning.weights import weigh
from mmpretrain.training.optim import parameter_groups
from mmpretrain.types import Outputs, Prediction
from tests import models
from tests.ranks import run_ranks

ROWS, EMBED = 600, 256
LOSSES = {
    "plain": ContrastiveLoss(tile_size=None),
    "tiled": ContrastiveLoss(tile_size=128),
    "ring": ContrastiveLoss(exchange="ring"),
    "several": MultiPositiveContrastiveLoss(tile_size=128),
    "sigmoid ring": SigmoidLoss(),
    "sigmoid gather": SigmoidLoss(exchange="gather"),
    "caption": PredictionLoss(),
}
COST = ModelCost({}, 0, 0, 0, 0, 0, EMBED, {"caption": Asked(5, EMBED, 50)})


def rows_of(name: str) -> int:
    return 200 if name == "plain" else ROWS


def sent_by_losses_and_ddp() -> dict[str, int]:
    import torch.distributed as dist

    from benchmarks._sockets import bytes_sent

    found: dict[str, int] = {}

    def count(name, work):
        dist.barrier()
        before = bytes_sent()
        work()
        dist.barrier()
        found[name] = bytes_sent() - before

    count("nothing", lambda: None)
    for name, loss in LOSSES.items():
        a, b = (torch.randn(rows_of(name), EMBED, requires_grad=True) for _ in range(2))
        hidden, weight = torch.randn(10, 5, EMBED, requires_grad=True), torch.randn(50, EMBED)
        outputs = Outputs(
            {"image": a, "text": b},
            torch.ones(1, requires_grad=True),
            torch.zeros(1, requires_grad=True),
            {"caption": Prediction(hidden, weight, torch.ones(10, 5, dtype=torch.long))},
            {"text": torch.arange(len(a))},
        )
        count(name, lambda loss=loss, outputs=outputs: loss(outputs).backward())
    model = torch.nn.parallel.DistributedDataParallel(models.clip(), gradient_as_bucket_view=True)

    def step() -> None:
        outputs = model(models.batch(4))
        (sum(e.sum() for e in outputs.embeddings.values()) + outputs.logit_scale.sum()).backward()

    step()  # the first step settles what is in which bucket
    count("ddp", step)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counters")
def test_gloo_ranks_send_what_is_predicted(size: int = 2):
    ranks = Ranks(size, 1, gloo=True)
    found = run_ranks(sent_by_losses_and_ddp, size)

    def each(name: str) -> float:
        return sum(of[name] - of["nothing"] for of in found) / size

    for name, loss in LOSSES.items():
        cost: LossCost = loss_costs({name: loss}, COST, Place(rows_of(name), size, torch.device("cpu")), False)[name]
        predicted = sum(message.sent(ranks) for message in cost.messages)
        # The rest are headers, some hundred bytes for each message and partner.
        headers = 0.01 * predicted + 1000 * (size - 1)
        assert predicted <= each(name) <= predicted + headers, name
    weights = weigh(models.clip(), torch.optim.AdamW, parameter_groups)
    predicted = sum(message.sent(ranks) for message in ddp(weights.trained, weights.buffers))
    assert predicted <= each("ddp") <= predicted + 3000


@settings(max_examples=30)
@given(st.integers(2, 4096), st.integers(1, 10**9))
def test_a_ring_sends_less_than_twice_the_tensor(n, size):
    ranks = Ranks(n, 1)
    whole = Message("x", "all-reduce", size).sent(ranks)
    halves = [Message("x", o, size).sent(ranks) for o in ("reduce-scatter", "all-gather")]
    assert whole == pytest.approx(sum(halves)) and size <= whole < 2 * size


@settings(max_examples=30)
@given(st.integers(1, 2048), st.integers(1, 1024))
def test_one_rank_alone_sends_nothing_and_a_ring_holds_less(rows, ranks):
    place = Place(rows, ranks, torch.device("cuda"))
    for of in (contrastive, sigmoid):
        gathered, ring = (of(512, place, 2048, ring) for ring in (False, True))
        assert ring.useful == gathered.useful
        if ranks > 8:
            assert ring.held < gathered.held
        assert sum(m.sent(Ranks(1, 1)) for m in gathered.messages) == 0
    assert ddp(8, 0)[0].part == GRADIENTS
