"""What one sample costs: against formulas derived here, and against what real tensors take."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_module
from torch.utils.flop_counter import FlopCounterMode

from mmpretrain.activation_checkpointing import checkpoint_activations
from mmpretrain.composition import register_resolvers
from mmpretrain.config import instantiate
from mmpretrain.planning.measure import ModelCost, flops, measure, rows
from mmpretrain.planning.weights import weigh
from tests import models

TINY = {"image": (3, 16, 16), "text": (12,)}


class Counted(NamedTuple):
    forward: dict[str, float]
    backward: dict[str, float]


def shipped(experiment: str, model: str, tokens: int, *overrides: str) -> Counted:
    register_resolvers()
    given = [f"experiment={experiment}", f"model={model}", *overrides]
    with initialize_config_module("mmpretrain.configs", version_base="1.3"):
        config = compose("train", overrides=given)
    side = config.data.image_size
    with torch.device("meta"):
        built = instantiate(config.model)
    return Counted(*flops(built, {"image": (3, side, side), "text": (tokens,)}))


def block(tokens: float, width: float) -> float:
    """Forward FLOPs of a Transformer block: 12 width^2 weights (4 of attention, 8 of its MLP), and two products of
    attention, each with two FLOPs for a multiplication."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def vit(patch: int, width: int, depth: int, class_token: bool = True, side: int = 224) -> float:
    patches = (side // patch) ** 2
    return 2 * patches * 3 * patch**2 * width + depth * block(patches + class_token, width)


def pool(queries: int, tokens: float, width: int, context: int) -> float:
    """Attention of `queries`: q and o for each query, k and v for each token, and two products."""
    return 4 * queries * width**2 + 4 * tokens * context * width + 4 * queries * tokens * width


CLIPS = {"clip_vit_b32": (32, 768, 12, 512, 512), "clip_vit_b16": (16, 768, 12, 512, 512)}
CLIPS["clip_vit_l14"] = (14, 1024, 24, 768, 768)


@pytest.mark.parametrize(("model", "tokens"), [("clip_vit_b32", 77), ("clip_vit_b16", 20), ("clip_vit_l14", 77)])
def test_clip_takes_the_products_of_its_layers(model, tokens):
    patch, width, depth, text_width, embed = CLIPS[model]
    image, text = vit(patch, width, depth), 12 * block(tokens, text_width)
    cost = shipped("image_text_clip", model, tokens)
    assert cost.forward["image encoder"] == pytest.approx(image, rel=1e-12)
    assert cost.forward["text encoder"] == pytest.approx(text, rel=1e-12)
    assert cost.forward["image projection"] == 2 * width * embed
    # Both gradients of a product cost as much as the product; pixels need none.
    first = 2 * (224 // patch) ** 2 * 3 * patch**2 * width
    forward = sum(cost.forward.values())
    assert sum(cost.backward.values()) == pytest.approx(2 * forward - first, rel=1e-12)


def test_coca_takes_the_products_of_its_layers():
    patch, width, depth, text, length, queries = 32, 768, 12, 512, 76, 256
    patches = (224 // patch) ** 2
    cost = shipped("image_text_coca", "coca_vit_b32", length)
    pools = pool(queries, patches, text, width) + pool(1, queries, text, text)
    assert cost.forward["image encoder"] == pytest.approx(vit(patch, width, depth, False) + pools, rel=1e-12)
    assert cost.forward["text encoder"] == pytest.approx(12 * block(length + 1, text), rel=1e-12)
    cross = pool(queries=length, tokens=queries, width=text, context=text) + 16 * length * text**2
    assert cost.forward["fusion"] == pytest.approx(12 * (block(length, text) + cross), rel=1e-12)


def test_dropped_patches_are_not_computed():
    dropped = shipped("openmoji_clip", "clip_tiny", 12)
    whole = shipped("openmoji_clip", "clip_tiny", 12, "model.encoders.image.model_args.patch_drop_rate=0")
    assert whole.forward["image encoder"] == pytest.approx(vit(8, 192, 4, side=64), rel=1e-12)
    assert dropped.forward["image encoder"] - 2 * 64 * 192 * 192 == pytest.approx(4 * block(33, 192), rel=1e-12)


def test_a_frozen_encoder_has_no_backward_pass():
    cost = shipped("image_text_clip", "clip_vit_b32", 20, "model.freeze=[image]")
    assert cost.backward["image encoder"] == 0 < cost.forward["image encoder"]


@pytest.mark.parametrize("family", [models.clip, models.siglip, models.coca])
def test_a_real_step_takes_the_products_that_were_counted(family):
    cost = measure(family, TINY, None, False)
    model = family()
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        outputs = model(rows(TINY, 5))
        asked = [p.hidden.sum() for p in outputs.predictions.values()]
        torch.stack([e.sum() for e in outputs.embeddings.values()] + asked).sum().backward()
    assert counter.get_total_flops() == pytest.approx(5 * cost.useful, rel=1e-12)


@pytest.mark.parametrize("family", [models.clip, models.coca])
def test_real_tensors_keep_the_bytes_that_were_counted(family):
    """Storages that the graph of a real batch holds, found by hooks and not by what counts on fake tensors."""
    cost = measure(family, TINY, None, True)
    held = []
    for size in (8, 24):
        model = family()
        own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        saved: dict[int, int] = {}

        def pack(x: torch.Tensor, own=own, saved=saved) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in own:
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        inputs = rows(TINY, size)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = model(inputs)
        held.append(sum(saved.values()))
        assert outputs.embeddings
    # What is alive but not saved: the outputs, masks and identities; a few bytes a sample.
    assert (held[1] - held[0]) / 16 == pytest.approx(cost.kept, rel=0.06)


def test_checkpointing_keeps_less_and_computes_more():
    def cost(mode: str | None) -> ModelCost:
        changed = None if mode is None else partial(checkpoint_activations, mode=mode)
        return measure(models.coca, TINY, torch.bfloat16, True, changed)

    none, selective, full = cost(None), cost("selective"), cost("full")
    assert full.kept < selective.kept < none.kept
    asked = none.predictions["caption"]
    assert (asked.positions, asked.width, asked.vocabulary) == (11, 32, models.VOCAB)
    assert none.recomputed == 0 and none.useful == selective.useful == full.useful
    # At most one more forward pass: what a block ends with is not asked for again.
    assert selective.recomputed < full.recomputed < full.forward


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_state_is_that_of_a_real_step(optimizer):
    register_resolvers()
    with initialize_config_module("mmpretrain.configs", version_base="1.3"):
        config = compose("train", overrides=["experiment=openmoji_clip", f"optimizer={optimizer}"])
    built = instantiate(config.optimizer)
    with torch.device("meta"):
        described = models.coca()
    found = weigh(described, built["optimizer"], built["groups"])
    model = models.coca()
    real = built["optimizer"](built["groups"](model, 0.1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        real.step()
    state = [x for of in real.state.values() for x in of.values() if isinstance(x, torch.Tensor)]
    assert found.state == sum(x.nbytes for x in state)
    assert found.optimizer_flops == counter.get_total_flops()
    assert found.parameters == found.trained == sum(p.nbytes for p in model.parameters())
    assert found.blocks == 2 + 2 + 4
