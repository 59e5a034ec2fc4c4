"""What is measured at logged steps, against plain references; shards of gradients count once."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mmpretrain import ContrastiveLoss, InputError
from mmpretrain.training.callbacks import Metrics
from mmpretrain.training.diagnostics import ROWS, Diagnostics, effective_rank, gradient_norm, measure, parts
from tests import models
from tests.faults.bad_steps import Poison, data, fit
from tests.ranks import run_ranks


def unit(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_effective_rank_knows_collapse_from_spread():
    assert effective_rank(unit(1, 8).repeat(50, 1)).item() == pytest.approx(1)
    assert effective_rank(torch.eye(8)).item() == pytest.approx(8)
    plane = torch.tensor([[math.cos(a), math.sin(a), 0] for a in torch.arange(64) * 2 * math.pi / 64])
    assert effective_rank(plane).item() == pytest.approx(2)
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))
    shares = torch.linalg.svdvals(unit(40, 6))
    shares = shares / shares.sum()
    assert effective_rank(unit(40, 6)).item() == pytest.approx(math.exp(-(shares * shares.log()).sum()))


def test_logits_and_gap_of_a_pair():
    image, text, scale = unit(5, 4), unit(5, 4, seed=1), torch.tensor([7.0], dtype=torch.float64)
    found = measure({"image": image, "text": text}, scale, torch.tensor([-2.0]))
    logits = [[7 * float(image[i] @ text[j]) - 2 for j in range(5)] for i in range(5)]
    negatives = [logits[i][j] for i in range(5) for j in range(5) if i != j]
    assert found["logits/image-text/positive"].item() == pytest.approx(sum(logits[i][i] for i in range(5)) / 5)
    assert found["logits/image-text/negative"].item() == pytest.approx(sum(negatives) / 20)
    assert found["logits/image-text/hardest_negative"].item() == pytest.approx(max(negatives))
    assert found["modality_gap/image-text"].item() == pytest.approx(float((image.mean(0) - text.mean(0)).norm()))
    assert set(found) == {
        "embedding_rank/image",
        "embedding_rank/text",
        "modality_gap/image-text",
        *(f"logits/image-text/{name}" for name in ("positive", "negative", "hardest_negative")),
    }


def test_three_modalities_make_three_pairs_and_big_batches_are_cut():
    found = measure({m: unit(ROWS + 9, 3, i) for i, m in enumerate(("image", "text", "audio"))}, torch.ones(1), None)
    pairs = {name.split("/")[1] for name in found if name.startswith("logits")}
    assert pairs == {"image-text", "image-audio", "text-audio"}
    whole = measure({"image": unit(ROWS + 9, 3)[:ROWS]}, torch.ones(1), None)
    assert torch.equal(found["embedding_rank/image"], whole["embedding_rank/image"])
    assert "logits/image-text/negative" not in measure({m: unit(1, 3) for m in ("image", "text")}, torch.ones(1), None)


def test_frozen_parts_have_no_gradient_norm():
    model = models.coca()
    assert list(parts(model)) == ["image", "text", "projections", "fusion", "heads"]
    model.encoders["image"].requires_grad_(False)
    assert "image" not in parts(model)


class Log(Metrics):
    """Keeps the rows that `Metrics` would log."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.rows: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.rows[trainer.global_step] = {name: float(value) for name, value in module.history.items()}


def test_training_measures_at_logged_steps_only_and_before_clipping(tmp_path):
    log = Log(2)
    _, module = fit(data(5), tmp_path, callbacks=[Diagnostics(2), Poison("gradient", {4}), log])
    measured = [step for step, row in log.rows.items() if "grad_norm/image" in row]
    assert measured == [2, 4, 5]
    names = {"grad_norm/image", "grad_norm/text", "grad_norm/projections", "embedding_rank/text"}
    assert names <= set(log.rows[2]) and "grad_norm/fusion" not in log.rows[2]
    assert math.isnan(log.rows[4]["grad_norm/text"]) and math.isfinite(log.rows[4]["grad_norm/image"])
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.model.parameters())


def test_an_interval_of_no_steps_is_refused():
    with pytest.raises(InputError, match="log_every_n_steps is 0"):
        Diagnostics(0)


def norms(shard_it: bool) -> dict[str, float]:
    from torch.distributed.device_mesh import init_device_mesh

    from mmpretrain.training.fsdp import shard

    model, batch = models.clip(), models.batch(4)
    if shard_it:
        shard(model, init_device_mesh("cpu", (2,)))
    ContrastiveLoss()(model(batch)).backward()
    return {name: float(gradient_norm(part)) for name, part in parts(model).items()}


def test_sharded_gradients_have_the_norm_of_whole_ones():
    first, second = run_ranks(norms, 2, True)
    (whole, _) = run_ranks(norms, 2, False)
    assert first == second
    assert first == pytest.approx(whole, rel=1e-3)
