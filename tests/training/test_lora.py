"""Low-rank adapters: found on any encoder, alone trained, merged exactly, and read by peft itself."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from mmpretrain import (
    ContrastiveLoss,
    HuggingFaceTextEncoder,
    ImageEncoder,
    InputError,
    MultimodalModel,
    Padded,
    TextEncoder,
)
from mmpretrain.activation_checkpointing import checkpoint_activations
from mmpretrain.distributed import rank, world_size
from mmpretrain.training.compilation import compile_model
from mmpretrain.training.float8 import convert_to_float8
from mmpretrain.training.fsdp import full_state, shard
from mmpretrain.training.lora import Lora, attention_layers, merge_adapter
from mmpretrain.training.optim import parameter_groups
from tests import models
from tests.ranks import run_ranks

BERT = {
    "model_type": "bert",
    "vocab_size": models.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
EVA = {**SIZES, "img_size": 28, "patch_size": 14}


def with_text(config: dict) -> MultimodalModel:
    torch.manual_seed(0)
    text = HuggingFaceTextEncoder(config, context_length=12)
    return MultimodalModel(16, {"image": models.clip().encoders["image"], "text": text})


def with_image(name: str, args: dict) -> MultimodalModel:
    torch.manual_seed(0)
    return MultimodalModel(16, {"image": ImageEncoder(name, args), "text": models.clip().encoders["text"]})


FAMILIES = {
    "clip": models.clip,
    "siglip": models.siglip,
    "coca": models.coca,
    "bert": lambda: with_text(BERT),
    "distilbert": lambda: with_text(
        {
            "model_type": "distilbert",
            "vocab_size": models.VOCAB,
            "dim": 32,
            "n_layers": 1,
            "n_heads": 2,
            "hidden_dim": 64,
        }
    ),
    "eva02": lambda: with_image("eva02_tiny_patch14_224", EVA),
    "beit": lambda: with_image("beit_base_patch16_224", SIZES),
}


def side(model: MultimodalModel) -> int:
    size = getattr(getattr(model.encoders["image"].backbone, "patch_embed", None), "img_size", (16, 16))
    return int(size[0])


def batch(model: MultimodalModel, size: int = 5) -> dict[str, Padded]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (size, 3, side(model), side(model)), generator=generator, dtype=torch.uint8)
    return {**models.batch(size), "image": Padded(pixels)}


def shaken(model: MultimodalModel) -> MultimodalModel:
    """Give every B other numbers than the zeros it begins with."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def plain(family: str, state: dict[str, torch.Tensor]) -> MultimodalModel:
    model = FAMILIES[family]()
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_alone_reach_every_attention_and_merge_exactly(family):
    model = FAMILIES[family]().eval()
    before = model(batch(model)).embeddings
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = Lora(rank=4, alpha=8)
    layers = lora.attach(model)
    assert {name.split(".")[1] for name in layers if name.startswith("encoders.")} == {"image", "text"}
    for modality, embedding in model(batch(model)).embeddings.items():
        torch.testing.assert_close(embedding, before[modality], rtol=0, atol=1e-6)
    shaken(model)
    outputs = model(batch(model))
    loss = ContrastiveLoss()(outputs) + sum(p.hidden.square().mean() for p in outputs.predictions.values())
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{layer}.lora_{part}.default.weight" for layer in layers for part in "AB"}
    unused = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not unused  # a layer whose adapter is passed by would be trained for nothing
    merged = plain(family, lora.merged(model.state_dict()))
    for modality, embedding in merged(batch(model)).embeddings.items():
        torch.testing.assert_close(embedding, outputs.embeddings[modality], rtol=0, atol=1e-5)
        assert (embedding - before[modality]).abs().max() > 1e-3
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed == {f"{layer}.weight" for layer in layers}


def test_the_merge_is_that_of_peft():
    model = models.coca()
    lora = Lora(rank=3, alpha=5)
    layers = lora.attach(model)
    merged = lora.merged(shaken(model).state_dict())
    for layer in layers:
        adapted = model.get_submodule(layer)
        want = adapted.base_layer.weight + adapted.get_delta_weight("default")
        torch.testing.assert_close(merged[f"{layer}.weight"], want.detach(), rtol=0, atol=1e-6)


def test_an_adapter_alone_is_read_by_peft_and_by_us(tmp_path):
    model = models.clip()
    lora = Lora(rank=4, alpha=8)
    lora.attach(model)
    state = shaken(model).eval().state_dict()
    lora.save(tmp_path, state, "runs/old/model")
    want = model(models.batch(4)).embeddings
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "runs/old/model"
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == sum(".lora_" in name for name in state)
    theirs = peft.PeftModel.from_pretrained(models.clip(), str(tmp_path)).eval()
    ours = models.clip().eval()
    merge_adapter(ours, tmp_path)
    for other in (theirs.base_model.model, ours):
        for modality, embedding in other(models.batch(4)).embeddings.items():
            torch.testing.assert_close(embedding, want[modality], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="adapter of another model"):
        merge_adapter(FAMILIES["bert"](), tmp_path)
    for content in ("{", "{}", "[]"):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(InputError, match="no adapter to read"):
            merge_adapter(ours, tmp_path)


@pytest.mark.parametrize("damage", ["extra", "unpaired", "elsewhere"])
def test_an_adapter_that_is_refused_changes_no_weight(tmp_path, damage):
    model = models.clip()
    lora = Lora(rank=4)
    lora.attach(model)
    lora.save(tmp_path, shaken(model).state_dict())
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    last = sorted(tensors)[-1]
    if damage == "extra":
        tensors["base_model.model.extra.bias"] = torch.zeros(2)
    elif damage == "unpaired":
        del tensors[last]
    else:
        tensors[last] = torch.zeros(3, 4)
    save_file(tensors, file)
    ours = models.clip()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(InputError, match=r"other tensors than pairs|of another shape"):
        merge_adapter(ours, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_targets_may_be_named_for_each_part():
    model = models.clip()
    layers = Lora(targets={"text": ["attention.q", "attention.v"]}).attach(model)
    assert layers == [f"encoders.text.blocks.{n}.attention.{name}" for n in range(2) for name in "qv"]
    assert all(name.startswith("encoders.text.") for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["eva02", "beit"])
def test_layers_named_by_the_user_are_trained_where_timm_multiplies_with_bare_weights(family):
    model = FAMILIES[family]()
    Lora(targets={"image": ["qkv"]}).attach(model)
    ContrastiveLoss()(shaken(model)(batch(model))).backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_batch_norms_beside_adapters_keep_their_averages():
    """They are weights too: with others the model that is saved would not be base and adapter."""
    image = ImageEncoder("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "stem_width": 8})
    model = MultimodalModel(16, {"image": image, "text": models.clip().encoders["text"]})
    Lora().attach(model)
    assert model.training and model.train().encoders["text"].training
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(models.batch(4))
    assert any(name.endswith("running_mean") for name in before)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_adapters_lie_beside_8_bit_layers_too():
    pytest.importorskip("torchao")

    def built() -> MultimodalModel:
        text = TextEncoder(models.VOCAB, 12, 1024, 1, 16, models.EOS)
        return MultimodalModel(16, {"image": models.clip().encoders["image"], "text": text})

    model, lora = built(), Lora(rank=4)
    lora.attach(model)
    converted = convert_to_float8(shaken(model), emulate=True)
    assert sum(name.endswith(".base_layer") for name in converted) == 4  # the adapters themselves are too small
    ContrastiveLoss()(model(models.batch(4))).backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    merged, texts = built(), models.batch(3)["text"]
    merged.load_state_dict(lora.merged(model.state_dict()))
    want = model.eval().embed("text", texts)
    torch.testing.assert_close(merged.eval().embed("text", texts), want, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look
def test_adapters_have_the_same_gradients_compiled_and_recomputed():
    torch._dynamo.reset()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        ContrastiveLoss()(model(models.batch(4, pad_to=12))).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    model = models.clip()
    Lora(rank=2).attach(model)
    shaken(model)
    want = gradients()
    checkpoint_activations(model, "selective")
    compile_model(model, "eager", by_block=True)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, want[name], rtol=0, atol=1e-6, msg=name)
    torch._dynamo.reset()


def test_frozen_encoders_get_no_adapter():
    text = models.clip().encoders["text"]
    model = MultimodalModel(16, {"image": models.clip().encoders["image"], "text": text}, freeze=["text"])
    assert all(name.startswith("encoders.image.") for name in Lora().attach(model))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank of at least 1"),
        ({"rank": 2.5}, "a whole rank"),
        ({"rank": "8"}, "a whole rank"),
        ({"alpha": float("nan")}, "a positive alpha"),
        ({"targets": ["q"]}, "a list of layers for each part"),
        ({"targets": {"text": "qv"}}, "a list of layers for each part"),
        ({"dropout": 1.0}, "dropout in"),
        ({"targets": {"audio": ["q"]}}, "names audio"),
        ({"targets": {"text": ["qq"]}}, "name of no linear layer"),
    ],
)
def test_what_cannot_be_adapted_is_said(options, match):
    with pytest.raises(InputError, match=match):
        Lora(**options).attach(models.clip())


def test_a_model_without_attention_is_refused():
    image = ImageEncoder("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)})
    assert not list(attention_layers(image))
    with pytest.raises(InputError, match="finds no attention"):
        Lora().attach(MultimodalModel(16, {"image": image}))


def trained(strategy: str, freeze: list[str]) -> dict[str, torch.Tensor]:
    model: MultimodalModel = MultimodalModel(16, dict(models.clip().encoders), freeze=freeze)
    lora = Lora(rank=2)
    torch.manual_seed(1)
    lora.attach(model)
    shaken(model)
    model.projections.requires_grad_(True)  # as beside encoders of several models
    step_of: nn.Module = model
    if strategy == "fsdp":
        shard(model, init_device_mesh("cpu", (world_size(),)))
    elif strategy == "ddp":
        step_of = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), 1e-2)
    rows = slice(rank() * 8 // world_size(), (rank() + 1) * 8 // world_size())
    for step in range(2):
        batch = {m: padded.rows(rows) for m, padded in models.batch(8, seed=step, pad_to=12).items()}
        ContrastiveLoss()(step_of(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = full_state(model) if strategy == "fsdp" else model.state_dict()
    return lora.merged({name: tensor.detach().clone() for name, tensor in state.items()})


def on_ranks() -> list[dict[str, torch.Tensor]]:
    return [trained(strategy, freeze) for strategy in ("ddp", "fsdp") for freeze in ([], ["text"])]


def test_adapters_on_two_ranks_whole_or_sharded_merge_as_in_one_process():
    """DDP would stop at a trained weight that gets no gradient; none of what is frozen may decay."""
    wanted = [trained("one", freeze) for freeze in ([], ["text"])] * 2
    for got, want in zip(run_ranks(on_ranks, 2)[0], wanted, strict=True):
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-5, msg=name)
    before = models.clip().encoders["text"].state_dict()
    assert all(torch.equal(wanted[1][f"encoders.text.{name}"], tensor) for name, tensor in before.items())


def test_saving_an_adapter_twice_leaves_no_parts_behind(tmp_path: Path):
    model = models.clip()
    lora = Lora()
    lora.attach(model)
    for _ in range(2):
        lora.save(tmp_path, model.state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
