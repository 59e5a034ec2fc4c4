"""The moving average: its recursion, what it leaves alone, and that it survives a resume."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from mmpretrain import InputError
from mmpretrain.training.ema import EMA
from tests import models
from tests.faults.bad_steps import data, differing, fit
from tests.ranks import run_ranks


class Module:
    """What the callback sees of a training module."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device, self.skipped = model, torch.device("cpu"), None


def drift(ema: EMA, module: Module, steps: int, skipped: frozenset[int] = frozenset()) -> list[torch.Tensor]:
    """Random walks of the weights; returns those of one parameter at each step that was not skipped."""
    generator, path = torch.Generator().manual_seed(3), []
    for step in range(steps):
        module.skipped = torch.tensor(float(step in skipped))
        if step not in skipped:
            with torch.no_grad():
                for parameter in module.model.parameters():
                    parameter += torch.randn(parameter.shape, generator=generator)
            path.append(module.model.weight.detach().clone())
        ema.on_train_batch_end(None, module, None, None, step)
    return path


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_follows_its_recursion(warmup):
    module, ema = Module(nn.Linear(3, 2)), EMA(0.9, warmup)
    want = module.model.weight.detach().double()
    ema.on_train_start(None, module)
    for t, weight in enumerate(drift(ema, module, 100)):
        decay = min(0.9, (1 + t) / (10 + t)) if warmup else 0.9
        want = decay * want + (1 - decay) * weight.double()
    torch.testing.assert_close(ema.average["weight"].double(), want, rtol=0, atol=1e-5)


def test_a_skipped_step_is_no_update():
    first, second = (Module(nn.Linear(3, 2)) for _ in range(2))
    second.model.load_state_dict(first.model.state_dict())
    one, other = EMA(0.9), EMA(0.9)
    one.on_train_start(None, first)
    other.on_train_start(None, second)
    drift(one, first, 8, frozenset({0, 3, 4, 7}))
    drift(other, second, 4)
    assert one.updates == other.updates == 4
    assert differing(one.average, other.average) == []


def test_the_average_is_applied_and_taken_back_bit_for_bit():
    module, ema = Module(nn.Linear(3, 2)), EMA(0.9)
    module.model.bias.requires_grad_(False)
    ema.on_train_start(None, module)
    drift(ema, module, 5)
    own = {name: value.clone() for name, value in module.model.state_dict().items()}
    with pytest.raises(KeyError), ema.applied(module.model):
        assert torch.equal(module.model.weight, ema.average["weight"])
        assert torch.equal(module.model.bias, own["bias"])
        raise KeyError
    assert differing(dict(module.model.state_dict()), own) == []
    assert list(ema.average) == ["weight"]


def test_half_precision_weights_have_a_float32_average():
    module, ema = Module(nn.Linear(3, 2).bfloat16()), EMA(0.9999, warmup=False)
    ema.on_train_start(None, module)
    before = ema.average["weight"].clone()
    drift(ema, module, 1)
    assert ema.average["weight"].dtype == torch.float32
    assert not torch.equal(ema.average["weight"], before)  # 1e-4 of a change is lost in bfloat16


def test_a_resumed_average_goes_on_exactly():
    whole, resumed = Module(nn.Linear(3, 2)), EMA(0.9)
    ema = EMA(0.9)
    ema.on_train_start(None, whole)
    drift(ema, whole, 7)
    state = {"updates": ema.updates.clone(), "average": {k: v.clone() for k, v in ema.average.items()}}
    module = Module(nn.Linear(3, 2))
    module.model.load_state_dict(whole.model.state_dict())
    resumed.load_state_dict(state)
    resumed.on_train_start(None, module)
    drift(ema, whole, 5)
    drift(resumed, module, 5)
    assert differing(ema.average, resumed.average) == [] and resumed.updates == 12


def test_an_average_of_another_model_is_refused():
    ema = EMA()
    ema.load_state_dict({"updates": torch.zeros(()), "average": {"elsewhere": torch.zeros(2)}})
    with pytest.raises(InputError, match="differ in the weights bias, elsewhere, weight"):
        ema.on_train_start(None, Module(nn.Linear(3, 2)))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(InputError, match=r"ema\.decay"):
        EMA(decay)


def test_training_keeps_an_average_between_the_first_weights_and_the_last(tmp_path):
    state, module = fit(data(4), tmp_path)
    start = models.clip().double().state_dict()
    weight = "encoders.text.token_embedding.weight"
    last = module.model.state_dict()[weight]
    average = state[f"average/{weight}"]
    assert 0 < (average - last).norm() < (start[weight] - last).norm()


def sharded() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        EMA().on_train_start(None, types.SimpleNamespace(model=model))
    except InputError as error:
        return str(error)
    return ""


def test_sharded_weights_are_refused():
    assert all("callbacks.ema.decay=null" in message for message in run_ranks(sharded, 2))
