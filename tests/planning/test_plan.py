"""The command: every shipped experiment can be planned, more devices never need more memory, bad input is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpretrain.cli import main
from mmpretrain.composition import register_resolvers
from mmpretrain.config import instantiate
from mmpretrain.losses import ContrastiveLoss, PredictionLoss
from mmpretrain.planning.hardware import Hardware
from mmpretrain.planning.loss_cost import loss_costs
from mmpretrain.planning.measure import Asked, ModelCost, PartCost
from mmpretrain.planning.predict import Input, Parallel, Run, largest_batch, largest_micro_batch, memory, times
from mmpretrain.planning.traffic import Ranks
from mmpretrain.planning.weights import Weights

CONFIGS = Path(str(files("mmpretrain.configs")))
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
TINY = "openmoji_clip"
QUICK = "optimizer=adamw"  # Muon's step takes seconds, even without memory


@pytest.fixture
def run_plan(capsys, monkeypatch) -> Callable[..., dict]:
    monkeypatch.setenv("MMPRETRAIN_RUN_ID", "test")

    def call(*overrides: str) -> dict:
        assert main(["plan", *overrides, "json=true"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def hardware(name: str = "h100") -> Hardware:
    register_resolvers()
    with initialize_config_module("mmpretrain.configs", version_base="1.3"):
        return instantiate(compose("plan", overrides=[f"hardware={name}"]).hardware)


def run(ranks: Ranks, parallel: Parallel = "ddp", micro: int | None = None) -> Run:
    part = PartCost(10e9, 20e9, 35 * 2**20)
    model = ModelCost({"image encoder": part}, 0, 2**20, 8192, 150528, 2e8, 512, {"caption": Asked(19, 512, 49408)})
    weights = Weights(6e8, 6e8, 24, 12e8, 0, 24, 4e8, 4e8, 3e7)
    losses = {"contrastive": ContrastiveLoss(), "caption": PredictionLoss()}
    return Run(
        model,
        weights,
        lambda place: loss_costs(losses, model, place, True),
        hardware(),
        ranks,
        parallel,
        True,
        True,
        micro,
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_planned(name, run_plan):
    found = run_plan(f"experiment={name}", f"model={name.split('_')[-1]}_tiny", QUICK)
    assert found["samples_per_s"] > 0 and found["memory"]["fits"]
    assert found["memory"]["largest_batch_size"] >= found["batch_size"]
    assert found["device_hours"] == pytest.approx(found["hours"])
    assert found["communication"]["messages"] == []


def test_many_nodes_by_either_strategy(run_plan):
    shared = ["data.global_batch_size=2048", "trainer.devices=8", "trainer.num_nodes=16", f"experiment={TINY}", QUICK]
    copied, sharded = run_plan(*shared), run_plan(*shared, "trainer=fsdp")
    assert (copied["parallel"], sharded["parallel"]) == ("ddp", "fsdp")
    assert sharded["memory"]["parts"]["optimizer state"] * 8 == copied["memory"]["parts"]["optimizer state"]
    assert copied["batch_size"] == 16 and copied["device_hours"] == pytest.approx(128 * copied["hours"])
    assert copied["communication"]["sent"] > 2 * 127 / 128 * copied["parameters"] * 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["hardware=nope"], "no hardware"),
        (["trainer.devices=3"], "cannot be divided by 3 devices"),
        (["trainer.devices=16"], "a node of hardware=h100 has 8"),
        (["trainer.num_nodes=0"], "at least 1"),
        (["plan.caption_tokens=0"], "plan.caption_tokens is 0"),
        (["plan.caption_tokens=100"], "cuts at 77"),
        (["trainer.precision=64-true"], "plan knows"),
        (["losses=coca"], "add the head to model.heads"),
        (["hardware.efficiency=2"], "it is a share"),
        (["hardware.memory_gib=-1"], "give a number above 0"),
        (["trainer.micro_batch_size=0"], "give at least 1"),
    ],
)
def test_bad_input_is_refused(given, said, capsys, monkeypatch):
    monkeypatch.setenv("MMPRETRAIN_RUN_ID", "test")
    assert main(["plan", f"experiment={TINY}", QUICK, *given]) == 2
    assert said in capsys.readouterr().err


def test_what_does_not_fit_comes_with_what_would(run_plan, capsys):
    found = run_plan(f"experiment={TINY}", QUICK, "hardware.memory_gib=2.9", "data.global_batch_size=512")
    assert found["bound"] == "memory" and not found["memory"]["fits"]
    assert any("trainer.micro_batch_size=" in line for line in found["memory"]["suggestions"])
    assert any("data.global_batch_size=" in line for line in found["memory"]["suggestions"])
    assert main(["plan", f"experiment={TINY}", QUICK, "trainer.devices=2"]) == 0
    assert "device hours" in capsys.readouterr().out


RUNS = {p: {n: run(Ranks(min(8, n), max(1, n // 8)), p) for n in (1, 2, 4, 8, 16, 64)} for p in ("ddp", "fsdp")}


@settings(deadline=None)
@given(st.sampled_from(["ddp", "fsdp"]), st.integers(1, 64), st.sampled_from([2, 4, 8, 16, 64]))
def test_more_devices_never_need_more_memory_each(parallel, times_64, devices):
    whole = 64 * times_64
    fewer, more = RUNS[parallel][devices // 2 if devices < 64 else 16], RUNS[parallel][devices]
    ours, theirs = (sum(memory(r, whole // r.ranks.all).values()) for r in (more, fewer))
    assert ours <= theirs


@settings(deadline=None)
@given(st.integers(1, 4096), st.integers(1, 512), st.sampled_from([1, 8, 64]))
def test_more_rows_need_more_memory_and_time(rows, further, devices):
    made = RUNS["ddp"][devices]
    feed = Input(600, 30_000)
    assert sum(memory(made, rows).values()) < sum(memory(made, rows + further).values())
    assert times(made, rows, feed).step < times(made, rows + further, feed).step


@pytest.mark.parametrize("devices", [1, 8, 64])
def test_the_largest_batch_is_the_largest(devices):
    made = RUNS["ddp"][devices]
    rows = largest_batch(made)
    room = made.hardware.usable_bytes
    assert rows % 8 == 0 and sum(memory(made, rows).values()) <= room < sum(memory(made, rows + 8).values())
    size = largest_micro_batch(made, 2 * rows)
    cut = made._replace(micro_batch_size=size)
    assert 0 < size <= rows and sum(memory(cut, 2 * rows).values()) <= room
    assert times(cut, 2 * rows, Input(1e9, 1)).model > times(made, 2 * rows, Input(1e9, 1)).model


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml")))
def test_hardware_builds(name):
    described = hardware(name)
    assert described.name == name and described.usable_bytes > 0
    assert described.matmul_flops(float32=True) < described.matmul_flops() < described.peak_tflops * 1e12
