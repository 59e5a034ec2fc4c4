"""The model of a checkpoint in the middle of a run, from every layout; damage and misfits are said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mmpretrain.errors import InputError
from mmpretrain.training.checkpoint import save
from mmpretrain.training.lora import Lora
from mmpretrain.training.manifest import DamagedCheckpoint
from mmpretrain.training.sharded_state import save_sharded
from mmpretrain.training.state_json import pack
from mmpretrain.training.step_model import load_step, step_weights
from tests.evaluation.suite_example import built, save_run
from tests.ranks import run_ranks


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_has_the_weights_of_its_step(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    for step in (10, 30):
        model, preprocess, tokenizer = load_step(run / "checkpoints" / f"step_{step:08d}")
        assert equal(model.state_dict(), built(step).state_dict())
        assert not model.training and preprocess.image_size == 16
        assert model.embed("text", tokenizer(["x"])).shape == (1, 16)


def test_a_moving_average_is_what_is_evaluated(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    own, average = built(1).state_dict(), dict(built(2).named_parameters())
    average.pop("logit_scale")  # frozen: not averaged
    state = {
        "state_dict": {f"model.{name}": tensor for name, tensor in own.items()},
        "callbacks": {"EMA": {"updates": torch.ones(()), "average": average}, "DataLog": {"order": [1]}},
    }
    found = step_weights(save(run / "checkpoints", state, 40))
    assert equal(found, {**own, **{name: weight.detach() for name, weight in average.items()}})


def test_adapters_of_a_fine_tuned_run_are_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = save_run(tmp_path / "run")
    config = OmegaConf.load(run / "config.yaml")
    config.finetune = {"lora": {"_target_": "mmpretrain.training.lora.Lora", "rank": 2, "alpha": 6.0}}
    OmegaConf.save(config, run / "config.yaml")
    model = built(3)
    Lora(2, 6.0).attach(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    state = {"state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()}}
    step = save(run / "checkpoints", state, 60)
    found, _, tokenizer = load_step(step)
    texts = tokenizer(["a red apple"])
    plain = built(3).eval().embed("text", texts)
    torch.testing.assert_close(found.embed("text", texts), model.eval().embed("text", texts), rtol=0, atol=1e-5)
    assert (found.embed("text", texts) - plain).abs().max() > 1e-3
    OmegaConf.save(OmegaConf.masked_copy(config, ["model", "data", "tokenizer"]), run / "config.yaml")
    with pytest.raises(InputError, match="low-rank adapters, of which"):
        load_step(step)


def save_in_parts(folder: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {"state_dict": {}, "optimizer_states": [torch.zeros(3)]}
    for name, tensor in built(7).state_dict().items():
        state["state_dict"][f"model.{name}"] = distribute_tensor(tensor, mesh, [Shard(0)])
    save_sharded(Path(folder), pack(state), 50, 2, dist.new_group(backend="gloo"))


def test_a_sharded_checkpoint_is_put_together(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    run_ranks(save_in_parts, 2, str(run / "checkpoints"))
    model = load_step(run / "checkpoints" / "step_00000050").model
    assert equal(model.state_dict(), built(7).state_dict())


def test_damage_and_misfits_are_said(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    step = run / "checkpoints" / "step_00000020"
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("embed_dim: 16", "embed_dim: 8"))
    with pytest.raises(InputError, match="of another shape"):
        load_step(step)
    (run / "config.yaml").unlink()
    with pytest.raises(InputError, match="the config of its run"):
        load_step(step)
    (run / "config.yaml").write_text("name: x")
    with pytest.raises(InputError, match="does not describe a run"):
        load_step(step)
    file = next(step.glob("state_dict*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=file.name):
        step_weights(step)
