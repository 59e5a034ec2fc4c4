"""The command: every shipped experiment can be planned, more devices never need more memory, bad input is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from mmpretrain.cli import main
from mmpretrain.composition import register_resolvers
from mmpretrain.config import instantiate
from mmpretrain.errors import InputError
from mmpretrain.losses import ContrastiveLoss, PredictionLoss
from mmpretrain.planning.arguments import Precision, averaged, parallel, precision
from mmpretrain.planning.hardware import Hardware
from mmpretrain.planning.loss_cost import loss_costs
from mmpretrain.planning.measure import Asked, ModelCost, PartCost
from mmpretrain.planning.numbers import number
from mmpretrain.planning.plan import Plan, plan, suggest
from mmpretrain.planning.predict import Input, Parallel, Run, largest_batch, largest_micro_batch, memory, times
from mmpretrain.planning.show import as_object, show
from mmpretrain.planning.traffic import Ranks
from mmpretrain.planning.weights import Weights

CONFIGS = Path(str(files("mmpretrain.configs")))
SAME = ("openmoji_coca", "openmoji_siglip")
"""The models and losses of image_text_coca and image_text_siglip; openmoji_clip stands for such data."""
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
TINY = "openmoji_clip"
QUICK = "optimizer=adamw"  # Muon's step takes seconds, even without memory


Planning = Callable[..., Plan]


@pytest.fixture(scope="module")
def planned() -> Iterator[Planning]:
    """Plans by their overrides, each made once: counting a model takes a second, all else nothing."""
    made: dict[tuple[str, ...], Plan] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMPRETRAIN_RUN_ID", "test")

        def call(*overrides: str) -> Plan:
            if overrides not in made:
                made[overrides] = plan(composed(*overrides))
            return made[overrides]

        yield call


def composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with initialize_config_module("mmpretrain.configs", version_base="1.3"):
        return compose("plan", overrides=[*overrides, QUICK])


@cache
def hardware(name: str = "h100") -> Hardware:
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


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in SAME])
def test_every_experiment_can_be_planned(name, planned):
    kind = name.split("_")[-1].replace("lit", "clip")  # LiT is CLIP with a text encoder that stays as it is
    found = planned(f"experiment={name}", f"model={kind}_tiny")
    assert found.samples_per_s > 0 and found.fits and found.largest >= found.rows
    assert found.reached * found.run.hardware.attainable == pytest.approx(found.mfu)
    assert found.run.ranks.all == 1 and as_object(found)["communication"]["messages"] == []


EIGHT = ("data.global_batch_size=2048", "trainer.devices=8", f"experiment={TINY}")


def test_many_nodes_by_either_strategy(planned):
    copied, sharded = (planned(*EIGHT, "trainer.num_nodes=16", f"trainer={t}") for t in ("ddp", "fsdp"))
    assert (copied.run.parallel, sharded.run.parallel) == ("ddp", "fsdp")
    assert sharded.memory["optimizer state"] * 8 == copied.memory["optimizer state"]
    found = as_object(copied)
    assert found["batch_size"] == 16 and found["device_hours"] == pytest.approx(128 * found["hours"])
    assert found["communication"]["sent"] > 2 * 127 / 128 * found["parameters"] * 4


def test_what_train_refuses_is_refused():
    with pytest.raises(InputError, match=r"callbacks.ema averages whole weights"):
        plan(composed(*EIGHT, "trainer=fsdp", "callbacks.ema.decay=0.99"))
    several = ["trainer.micro_batch_size=8", "trainer.activation_checkpointing=selective"]
    with pytest.raises(InputError, match=r"activation_checkpointing=selective would keep"):
        plan(composed(*EIGHT, "trainer=ddp", *several))
    with pytest.raises(ConfigCompositionException):
        composed("trainer=gpu", "trainer.num_nodes=2")


def test_a_moving_average_is_memory_and_time():
    made = RUNS["ddp"][8]
    average = made._replace(averaged=True)
    assert memory(average, 8) == {**memory(made, 8), "moving average": made.weights.trained}
    feed = Input(600, 30_000)
    assert times(average, 8, feed).optimizer > times(made, 8, feed).optimizer
    for decay, wanted in (("null", False), ("0.99", True)):
        assert averaged(composed(f"callbacks.ema.decay={decay}")) is wanted


def test_only_a_strategy_that_says_so_keeps_gradients_in_buckets():
    assert parallel(composed("trainer=gpu", "trainer.devices=2"), Ranks(2, 1)) == ("ddp", False)
    assert parallel(composed("trainer=ddp"), Ranks(2, 1)) == ("ddp", True)


def test_a_gpu_is_not_planned_with_the_precision_of_this_host():
    config = composed(f"experiment={TINY}", "trainer=cpu")
    try:
        OmegaConf.register_new_resolver("cpu_precision", lambda: "32-true", replace=True)
        assert precision(config, hardware("h100")) == (torch.bfloat16, "32-true")
        assert precision(config, hardware("cpu")) == (None, None)
        config.trainer.precision = "32-true"  # the user's word
        assert precision(config, hardware("h100")) == (None, None)
    finally:
        register_resolvers()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["hardware=nope"], "no hardware"),
        (["trainer.devices=3"], "cannot be divided by 3 devices"),
        (["trainer.devices=16"], "a node of hardware=h100 has 8"),
        (["trainer=ddp", "trainer.num_nodes=0"], "at least 1"),
        (["plan.caption_tokens=0"], "plan.caption_tokens is 0"),
        (["plan.caption_tokens=null"], "plan.caption_tokens is null"),
        (["plan.caption_tokens=100"], "cuts at 77"),
        (["plan.samples_seen=abc"], "plan.samples_seen is 'abc'"),
        (["+plan.shapes.image=[3,x]"], "plan.shapes.image is 'x'"),
        (["trainer.precision=64-true"], "plan knows"),
        (["losses=coca"], "add the head to model.heads"),
        (["hardware.efficiency=2"], "it is a share"),
        (["hardware.efficiency=abc"], "hardware.efficiency is 'abc'; give a number above 0"),
        (["hardware.memory_gib=.nan"], "hardware.memory_gib is"),
        (["trainer.micro_batch_size=0"], "give a whole number of at least 1"),
    ],
)
def test_bad_input_is_refused(given, said, capsys, monkeypatch):
    monkeypatch.setenv("MMPRETRAIN_RUN_ID", "test")
    assert main(["plan", f"experiment={TINY}", QUICK, *given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("value", [None, "abc", True, -1, 0, float("nan"), float("inf"), [1]])
def test_what_is_no_number_above_zero_is_refused(value):
    with pytest.raises(InputError, match=r"plan\.x is .*; give a number above 0"):
        number("plan.x", value)
    with pytest.raises(InputError, match=r"give a whole number of at least 2"):
        number("plan.x", value if value != "abc" else 2.5, 2, whole=True)


def test_what_does_not_fit_comes_with_what_would(planned, capsys):
    cramped = ("hardware.memory_gib=2.5", "data.global_batch_size=512", f"experiment={TINY}")
    found = planned(*cramped)
    assert found.bound == "memory" and not found.fits
    for key in ("trainer.micro_batch_size=", "trainer.activation_checkpointing=full", "data.global_batch_size="):
        assert any(line.startswith(key) for line in found.suggestions), key
    show(found, as_json=False)
    assert "does not fit" in capsys.readouterr().out
    # Train refuses the two together, so neither is suggested beside the other.
    shapes = {"image": (3, 64, 64), "text": (20,)}
    said = {}
    for key, size in (("trainer.activation_checkpointing=selective", None), ("trainer.micro_batch_size=256", 256)):
        cut = found._replace(run=found.run._replace(micro_batch_size=size))
        said[size] = suggest(composed(*cramped, key), instantiate, cut, shapes, Precision(torch.bfloat16, None))
    assert said[None] and not any("micro_batch_size" in line for line in said[None])
    assert said[256] and not any("selective" in line for line in said[256])


RUNS = {p: {n: run(Ranks(min(8, n), max(1, n // 8)), p) for n in (1, 2, 4, 8, 16, 64)} for p in ("ddp", "fsdp")}


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["ddp", "fsdp"]), st.integers(1, 64), st.sampled_from([2, 4, 8, 16, 64]))
def test_more_devices_never_need_more_memory_each(parallel, times_64, devices):
    whole = 64 * times_64
    fewer, more = RUNS[parallel][devices // 2 if devices < 64 else 16], RUNS[parallel][devices]
    ours, theirs = (sum(memory(r, whole // r.ranks.all).values()) for r in (more, fewer))
    assert ours <= theirs


@settings(deadline=None, max_examples=30)
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


def test_ranks_of_a_cpu_divide_the_machine():
    whole, shared = hardware("cpu"), hardware("cpu").shared(4)
    assert 4 * shared.usable_bytes == whole.usable_bytes and 4 * shared.cores_per_device == whole.cores_per_device
    made = run(Ranks(1, 1))._replace(hardware=whole)
    several = run(Ranks(4, 1, gloo=True))._replace(hardware=shared)
    feed = Input(600, 30_000)
    assert times(several, 16, feed).step >= times(made, 64, feed).step  # the same cores for the same rows
    assert hardware("h100").shared(8) == hardware("h100")


def test_input_takes_its_time_from_a_cpu_but_runs_beside_a_gpu():
    feed = Input(1, 30_000)
    on_cpu, on_gpu = (times(run(Ranks(1, 1))._replace(hardware=hardware(name)), 64, feed) for name in ("cpu", "h100"))
    assert on_cpu.step == on_cpu.device + on_cpu.input > on_cpu.input
    assert on_gpu.step == max(on_gpu.device, on_gpu.input)
    assert on_gpu.bound == "input" and times(run(Ranks(1, 1)), 64, Input(1e9, 1)).bound == "compute"


def test_the_plan_gives_each_rank_of_a_cpu_its_share(planned):
    found = planned(f"experiment={TINY}", "hardware=cpu", "trainer=ddp_cpu", "data.global_batch_size=64")
    assert found.run.hardware == hardware("cpu").shared(2)
    assert any("one run of CLIP B/32" in line for line in found.notes)


def test_adapters_are_what_is_trained(planned: Planning):
    tiny = (f"experiment={TINY}", QUICK)
    whole, adapted = planned(*tiny), planned(*tiny, "finetune=safe", "finetune.lora.rank=2")
    # Beside the adapters' own products: forward as before, and no gradients of weights, which are half of backward.
    assert adapted.run.model.forward == pytest.approx(whole.run.model.forward, rel=0.05)
    assert 0.6 < adapted.run.model.useful / whole.run.model.useful < 0.75
    assert adapted.run.weights.trained < 0.02 * whole.run.weights.trained
    assert adapted.run.weights.state < 0.02 * whole.run.weights.state
    assert any("original model" in note for note in adapted.notes) and not any(
        "original" in note for note in whole.notes
    )
