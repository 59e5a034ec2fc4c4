"""FSDP2 on gloo ranks: the same loss and weights as one process, and checkpoints for any number of ranks."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mmpretrain import ContrastiveLoss, ImageEncoder, MultimodalModel, Padded, PredictionLoss
from mmpretrain.activation_checkpointing import checkpoint_activations
from mmpretrain.distributed import rank, sum_over_ranks, world_size
from mmpretrain.errors import InputError
from mmpretrain.training.checkpoint import load, newest, shapes
from mmpretrain.training.compilation import compile_model, uncompiled
from mmpretrain.training.folder import checkpoints
from mmpretrain.training.fsdp import shard
from mmpretrain.training.manifest import DamagedCheckpoint, read_manifest, verify
from mmpretrain.training.optim import parameter_groups
from mmpretrain.training.saving import Checkpoints
from mmpretrain.training.sharded import ShardedStrategy
from mmpretrain.training.sharded_state import load_sharded, save_sharded
from mmpretrain.training.snapshot import Snapshot
from mmpretrain.training.state_json import pack
from tests import models
from tests.faults.checkpoints import small_disk
from tests.ranks import run_ranks

TOTAL, STEPS = 8, 3


def steps(sharded: bool, faster: bool = False) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
    model: MultimodalModel = models.coca().double()
    if faster:
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        checkpoint_activations(model, "selective")
        compile_model(model, "eager", by_block=True)
    if sharded:
        shard(model, init_device_mesh("cpu", (world_size(),)))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    rows = slice(rank() * TOTAL // world_size(), (rank() + 1) * TOTAL // world_size())
    losses = []
    for step in range(STEPS):
        whole = models.batch(TOTAL, seed=step, pad_to=12)
        text = Padded(whole["text"].values[rows], whole["text"].mask[rows])
        outputs = model({"image": Padded(whole["image"].values[rows].double() / 255), "text": text})
        loss = ContrastiveLoss()(outputs) + 2 * PredictionLoss()(outputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((sum_over_ranks(loss) / world_size()).item())
    with uncompiled():
        embedding = model.embed("text", models.batch(3)["text"])
        (layer,) = model.encode_layers("text", models.batch(3)["text"], [0])
        embedding = torch.cat([embedding, layer.pooled], dim=1).detach()
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return losses, {name: tensor.detach().clone() for name, tensor in full.items()}, embedding


def test_two_sharded_ranks_equal_one_process():
    want_losses, want, want_embedding = steps(False)
    for losses, got, embedding in run_ranks(steps, 2, True):
        torch.testing.assert_close(losses, want_losses, rtol=0, atol=1e-10)
        torch.testing.assert_close(embedding, want_embedding, rtol=0, atol=1e-10)
        for name, parameter in want.items():
            # AdamW divides by the root of tiny second moments: rounding grows there, and there alone.
            torch.testing.assert_close(got[name], parameter, rtol=0, atol=1e-7, msg=name)


@pytest.mark.slow
def test_sharded_ranks_that_compile_and_checkpoint_equal_one_process():
    want_losses, want, want_embedding = steps(False)
    for losses, got, embedding in run_ranks(steps, 2, True, True):
        torch.testing.assert_close(losses, want_losses, rtol=0, atol=1e-10)
        torch.testing.assert_close(embedding, want_embedding, rtol=0, atol=1e-10)
        for name, parameter in want.items():
            torch.testing.assert_close(got[name], parameter, rtol=0, atol=1e-7, msg=name)


def halves(sharded: bool) -> dict[str, torch.Tensor]:
    """Gradients of one step under bfloat16 autocast."""
    model: MultimodalModel = models.coca()
    if sharded:
        shard(model, init_device_mesh("cpu", (world_size(),)), half=True)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    rows = slice(rank() * TOTAL // world_size(), (rank() + 1) * TOTAL // world_size())
    batch = {modality: padded.rows(rows) for modality, padded in models.batch(TOTAL, pad_to=12).items()}
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
        assert outputs.logit_scale.dtype == torch.float32 and outputs.logit_scale.item() == pytest.approx(1 / 0.07)
        (ContrastiveLoss()(outputs) + 2 * PredictionLoss()(outputs)).backward()
    found = {n: p.grad.full_tensor() if sharded else p.grad for n, p in model.named_parameters()}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    return found


def test_blocks_that_travel_in_half_precision_train_as_autocast_does():
    """Matrices are rounded to bfloat16 either way; sums over ranks and what is outside of blocks stay float32."""
    want = halves(False)
    for got in run_ranks(halves, 2, True):
        error = torch.stack([(got[name] - gradient).norm() for name, gradient in want.items()]).norm()
        size = torch.stack([gradient.norm() for gradient in want.values()]).norm()
        assert error < 0.03 * size, error / size
        torch.testing.assert_close(got["logit_scale"], want["logit_scale"], rtol=0.05, atol=1e-3)


def convolutional() -> None:
    image = ImageEncoder("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)})
    model = MultimodalModel(16, {"image": image, "text": models.clip().encoders["text"]})
    shard(model, init_device_mesh("cpu", (world_size(),)))
    ContrastiveLoss()(model({**models.batch(4), "image": Padded(torch.rand(4, 3, 64, 64))})).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stages_of_blocks_are_sharded_once():
    run_ranks(convolutional, 1)


def trained(mesh_shape: tuple[int, ...], seed: int = 0) -> tuple[MultimodalModel, torch.optim.Optimizer, DeviceMesh]:
    model: MultimodalModel = models.clip(seed)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("data_parallel", "tensor_parallel")[-len(mesh_shape) :])
    shard(model, mesh)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    for step in range(2):
        outputs = model({**models.batch(4, seed=step), "image": Padded(torch.rand(4, 3, 16, 16))})
        ContrastiveLoss()(outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, mesh


def whole(value: Any) -> Any:
    """Gather every sharded tensor of a state."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def saved(mesh_shape: tuple[int, ...], folder: Path) -> dict[str, Any]:
    model, optimizer, _ = trained(mesh_shape)
    state = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "global_step": 7,
        "t": (1,),
    }
    packed, snapshot = pack(state), Snapshot()
    snapshot.take({name: tensor + 1 for name, tensor in packed.tensors.items()})  # an earlier save's
    path = save_sharded(
        folder, packed._replace(tensors=snapshot.take(packed.tensors)), 7, 2, dist.new_group(backend="gloo")
    )
    assert (path is None) == (rank() > 0)
    return whole(state)


def loaded(mesh_shape: tuple[int, ...], folder: Path) -> dict[str, Any]:
    model, optimizer, mesh = trained(mesh_shape, seed=rank() + 1)  # other weights everywhere
    state = load_sharded(verify_path(folder), mesh)
    model.load_state_dict(state["state_dict"])
    optimizer.load_state_dict(state["optimizer_states"][0])
    return whole({**state, "state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]})


def verify_path(folder: Path) -> Path:
    path = newest(folder).path
    assert path is not None
    return path


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.slow
def test_a_sharded_checkpoint_is_read_by_any_number_of_ranks(tmp_path):
    want = run_ranks(saved, 2, (2,), tmp_path)[0]
    path = tmp_path / "step_00000007"
    assert {name.split("-")[0] for name in read_manifest(path).files} == {"shard", "state.json"}
    assert not [*path.glob("*.metadata")]  # torch's default, a pickle
    model = models.clip()
    assert shapes(path) == {name: tensor.shape for name, tensor in model.state_dict().items()}
    for ranks, mesh in ((1, (1,)), (4, (2, 2))):
        for got in run_ranks(loaded, ranks, mesh, tmp_path):
            same(got, want)
    with pytest.raises(InputError, match="trainer=fsdp"):
        load(path)
    (file, *_) = path.glob("shard-00002*")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedCheckpoint, match="shard-00002"):
        verify(path)


@pytest.mark.slow
def test_a_mesh_of_two_dimensions_saves_one_copy(tmp_path):
    (want, *_) = run_ranks(saved, 4, (2, 2), tmp_path)
    bytes_saved = sum(file.stat().st_size for file in (tmp_path / "step_00000007").glob("*.safetensors"))
    tensors = [
        *want["state_dict"].values(),
        *(t for s in want["optimizer_states"][0]["state"].values() for t in s.values()),
    ]
    assert bytes_saved < 1.5 * sum(tensor.nbytes for tensor in tensors) + 100_000
    (got,) = run_ranks(loaded, 1, (1,), tmp_path)
    same(got, want)


def nowhere(*folders: Path) -> list[str]:
    group, results = dist.new_group(backend="gloo"), []
    for folder in folders:
        try:
            save_sharded(folder, pack({"a": torch.zeros(3_000_000)}), 1, 2, group)
            results.append("nothing")
        except OSError as error:
            results.append(str(error))
    return results


def test_ranks_agree_on_a_save_that_failed(tmp_path):
    (tmp_path / "file").write_text("")
    with small_disk(4 << 20) as disk:
        folders = [tmp_path / "file", *([] if disk is None else [disk / "checkpoints"])]
        first, other = run_ranks(nowhere, 2, *folders)
    assert set(other) == {"nothing"} and "exists" in first[0]
    assert "12 MB are needed" in first[-1] or len(folders) == 1


def fitted(folder: Path, steps: int, resume: bool, back_at: int = 0) -> tuple[Any, list[int | None]]:
    """Train through Lightning, as `trainer=fsdp` does; go back to the last checkpoint after step `back_at`."""
    from tests.training.test_saving import Counter, Linear, Rows

    class Sharded(Linear):
        def configure_model(self) -> None:
            fully_shard(self.layer, mesh=self.device_mesh)

    os.environ |= {name: str(rank()) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(world_size()) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    own, back = Checkpoints(folder, 2), []
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size(),
        strategy=ShardedStrategy(),
        max_steps=steps,
        callbacks=[own, Counter({back_at: lambda trainer, module: back.append(own.restore(trainer))})],
        plugins=[own.io],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Sharded()
    trainer.fit(module, Rows(4), ckpt_path=newest(folder).path if resume else None)
    return whole([module.state_dict(), trainer.optimizers[0].state_dict()]), back


@pytest.mark.slow
def test_lightning_saves_resumes_and_goes_back_sharded(tmp_path):
    want, _ = run_ranks(fitted, 2, tmp_path, 4, False)[0]
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000004", "step_00000002"]
    got, _ = run_ranks(fitted, 1, tmp_path, 4, True)[0]  # nothing left to do: what was saved comes back
    same(got, want)
    for got, back in run_ranks(fitted, 2, tmp_path, 6, True, 5):
        assert back == [4]
        assert torch.isfinite(got[0]["layer.weight"]).all()
        assert got[1]["state"][0]["step"] == 5  # of the six steps, one was taken back
