"""Inner layers of every encoder: what the blocks give, as tokens and maps, compiled, exported, in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmpretrain import Encoded, ImageEncoder, InputError, MultimodalModel, Padded, TextEncoder
from mmpretrain.encoders.layered import layer_indices
from mmpretrain.types import LayeredEncoder, MapEncoder
from tests import models
from tests.models import VIT

DEEP = {**VIT, "depth": 4}
BACKBONES = {
    "class token": ("vit_tiny_patch16_224", DEEP, 16),
    "registers": ("vit_tiny_patch16_224", {**DEEP, "reg_tokens": 2, "dynamic_img_size": True}, 32),
    "average": ("vit_tiny_patch16_224", {**DEEP, "class_token": False, "global_pool": "avg"}, 16),
    "attention pool": ("vit_tiny_patch16_224", {**DEEP, "class_token": False, "global_pool": "map"}, 16),
    "clip vit": ("vit_base_patch32_clip_224", {**DEEP, "act_layer": "quick_gelu"}, 16),
    "eva": ("eva02_tiny_patch14_224", {**DEEP, "swiglu_mlp": True}, 16),
    "class attention": ("cait_xxs24_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, 32),
    "resnet": ("resnet18", {}, 64),
    "clip resnet": ("resnet50_clip", {"img_size": 64, "width_factor": 0.25}, 64),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, 64),
    "efficientnet": ("efficientnet_b0", {}, 64),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "depths": [1, 1, 1, 1]}, 64),
    "fastvit": ("fastvit_t8", {"layers": [1, 1, 1, 1]}, 64),
}


def encoder_of(name: str) -> tuple[ImageEncoder, torch.Tensor]:
    torch.manual_seed(0)
    backbone, args, size = BACKBONES[name]
    pixels = torch.randint(0, 256, (2, 3, size, 2 * size if "dynamic_img_size" in args else size), dtype=torch.uint8)
    return ImageEncoder(backbone, args).eval(), pixels


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_layers_have_the_sizes_that_are_listed(name):
    encoder, pixels = encoder_of(name)
    assert isinstance(encoder, LayeredEncoder) and isinstance(encoder, MapEncoder)
    info = encoder.layer_info()
    every = list(range(len(info)))
    maps, encoded = encoder.maps(pixels, every), encoder.encode_layers(pixels, None, every)
    for layer, features, one in zip(info, maps, encoded, strict=True):
        height, width = (-(-side // layer.reduction) for side in pixels.shape[-2:])
        assert features.shape == (2, layer.width, height, width), layer
        assert one.tokens.shape == (2, height * width, layer.width) and one.pooled.shape == (2, layer.width)
        assert torch.equal(one.tokens, features.flatten(2).transpose(1, 2)) and one.mask is None
        assert features.isfinite().all()


@pytest.mark.parametrize("name", ["class token", "registers", "clip vit", "average"])
@torch.no_grad()
def test_layers_are_the_outputs_of_the_blocks(name):
    encoder, pixels = encoder_of(name)
    backbone, given, first = encoder.backbone, [], encoder.backbone.num_prefix_tokens
    x = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(encoder.normalize(pixels)))))
    for block in backbone.blocks:
        given.append(x := block(x))
    asked = [-1, 0, 2, 0]  # in any order, as often as wanted
    for norm in (False, True):
        found = encoder.encode_layers(pixels, None, asked, norm)
        for layer, one in zip(asked, found, strict=True):
            want = backbone.norm(given[layer]) if norm else given[layer]
            assert torch.equal(one.tokens, want[:, first:])
            torch.testing.assert_close(one.pooled, want[:, 0] if first else want.mean(1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_normed_last_layer_is_what_encode_gives():
    encoder, pixels = encoder_of("class token")
    (last,) = encoder.encode_layers(pixels, None, [-1], norm=True)
    encoded = encoder(pixels)
    torch.testing.assert_close(last.tokens, encoded.tokens[:, 1:])
    torch.testing.assert_close(last.pooled, encoded.pooled)
    encoder, pixels = encoder_of("resnet")
    (last,) = encoder.encode_layers(pixels)
    torch.testing.assert_close(last.tokens, encoder(pixels).tokens)
    torch.testing.assert_close(last.pooled, encoder(pixels).pooled)


@torch.no_grad()
def test_layers_above_the_highest_do_not_run():
    encoder, pixels = encoder_of("class token")
    ran = []
    for index, block in enumerate(encoder.backbone.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    encoder.encode_layers(pixels, None, [1, 0])
    text = models.clip().encoders["text"].eval()
    for index, block in enumerate(text.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(f"text {index}"))
    text.encode_layers(models.batch(2)["text"].values, None, [-2])
    assert ran == [0, 1, "text 0"]


@torch.no_grad()
def test_llava_reads_what_transformers_calls_hidden_states(tmp_path):
    """LLaVA takes `hidden_states[-2]` of a CLIPVisionModel without its class token."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from mmpretrain.interop.huggingface_names import CLIP
    from mmpretrain.interop.names import to_ours

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    theirs = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16)).eval()
    args = {**DEEP, "act_layer": "quick_gelu"}
    ours = ImageEncoder("vit_base_patch32_clip_224", args).eval()
    weights = {
        name if name.startswith("vision_model.") else f"vision_model.{name}": tensor
        for name, tensor in theirs.state_dict().items()
        if not name.endswith("position_ids")
    }
    renamed = to_ours(weights, CLIP, "transformers")
    ours.load_state_dict({name.removeprefix("encoders.image."): tensor for name, tensor in renamed.items()})
    pixels = torch.randn(3, 3, 16, 16)
    want = theirs(pixels, output_hidden_states=True).hidden_states
    for layer in (-2, -1, 0):
        (found,) = MultimodalModel(8, {"image": ours}).eval().encode_layers("image", pixels, [layer])
        counted = layer if layer < 0 else layer + 1  # theirs begin with the embedded patches
        torch.testing.assert_close(found.tokens, want[counted][:, 1:], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.pooled, want[counted][:, 0], rtol=0, atol=1e-5)


TEXTS = {
    "eos": {},
    "mean": {"causal": False, "pooling": "mean"},
    "last": {"causal": False, "pooling": "last"},
    "class token": {"pooling": "class_token"},
    "legacy class token": {"pooling": "class_token", "class_mask": "legacy"},
    "bidirectional class token": {"pooling": "class_token", "causal": False},
}


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_layers_of_texts_are_the_outputs_of_the_blocks(name):
    torch.manual_seed(0)
    encoder = TextEncoder(models.VOCAB, 12, 32, 3, 2, models.EOS, **TEXTS[name]).eval()
    values, mask, _ = models.batch(5, pad_to=12)["text"]
    assert [layer[1:] for layer in encoder.layer_info()] == [(32, 1)] * 3
    given = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _, args, out: given.append(out))
    found = encoder.encode_layers(values, mask, [2, -3, -2])
    assert len(given) == 3
    for layer, one in zip((2, 0, 1), found, strict=True):
        assert torch.equal(one.tokens, given[layer][:, : values.shape[1]]) and torch.equal(one.mask, mask)
    (last,) = encoder.encode_layers(values, mask, [-1], norm=True)
    whole = encoder(values, mask)  # packed, where the encoder does that
    torch.testing.assert_close(last.pooled, whole.pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(last.tokens[mask], whole.tokens[mask], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_text_is_pooled_where_the_encoder_pools():
    model = models.clip().eval()
    values, mask, _ = models.batch(3, lengths=[4, 9, 12])["text"]
    (layer,) = model.encode_layers("text", Padded(values, mask), [0])
    assert torch.equal(layer.pooled, layer.tokens[torch.arange(3), torch.tensor([3, 8, 11])])
    wide = Padded(values[:, :5], mask[:, :5])
    torch.testing.assert_close(model.encode_layers("text", wide, [0])[0].tokens[0, :4], layer.tokens[0, :4])


def test_the_model_gives_layers_maps_and_their_list():
    model, pixels = models.coca().eval(), models.batch(2)["image"]
    assert [layer.name for layer in model.feature_info("image")] == ["blocks.0", "blocks.1"]
    assert model.feature_info("image")[0] == ("blocks.0", 32, 8) and len(model.feature_info("text")) == 2
    (encoded,) = model.encode_layers("image", pixels, [-2])
    (features,) = model.feature_maps("image", pixels.values, [0])
    assert isinstance(encoded, Encoded) and features.shape == (2, 32, 2, 2)
    assert torch.equal(encoded.tokens, features.flatten(2).transpose(1, 2))


class _NoLayers(nn.Module):
    width = 4

    def forward(self, values, mask=None):
        return Encoded(values, values[:, None], None)


def test_what_there_is_not_is_refused():
    model, pixels = models.clip(), models.batch(2)["image"]
    with pytest.raises(InputError, match=r"no layer 2: this encoder has 2; count them from 0 to 1, or from -2 to -1"):
        model.eval().encode_layers("image", pixels, [0, 2])
    with pytest.raises(InputError, match="no layer -3"):
        model.encode_layers("text", models.batch(2)["text"], [-3])
    with pytest.raises(InputError, match="layers is empty"):
        model.feature_maps("image", pixels, [])
    with pytest.raises(InputError, match="lie on no grid; use encode_layers"):
        model.feature_maps("text", models.batch(2)["text"])
    with pytest.raises(InputError, match="no encoder for 'audio'; this model has image, text"):
        model.feature_info("audio")
    with pytest.raises(
        InputError, match=r"the encoder of 'audio' \(_NoLayers\) gives no layers; write its encode_layers"
    ):
        MultimodalModel(4, {"audio": _NoLayers()}).encode_layers("audio", torch.zeros(1, 4))
    assert layer_indices([-1, 0, 1], 2) == [1, 0, 1]


def test_patch_dropout_leaves_no_map():
    encoder = ImageEncoder("vit_tiny_patch16_224", {**VIT, "img_size": 32, "patch_drop_rate": 0.5})
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"call model\.eval\(\)"):
        encoder.train().maps(pixels)
    assert encoder.eval().maps(pixels)[0].shape == (1, 32, 4, 4)


def test_a_frozen_encoder_gives_layers_without_gradients_to_itself():
    parts = dict(models.clip().encoders)
    model = MultimodalModel(16, parts, freeze=["image"]).train()
    neck = nn.Conv2d(32, 4, 1)
    (features,) = model.feature_maps("image", models.batch(2)["image"], [0])
    assert not features.requires_grad and not model.encoders["image"].training
    neck(features).sum().backward()
    assert neck.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


COMPILED = {"clip": models.clip, "siglip": models.siglip, "coca": models.coca}


@pytest.mark.parametrize("family", COMPILED)
@torch.no_grad()
def test_layers_compile_as_one_graph(family):
    torch._dynamo.reset()
    model, batch = COMPILED[family]().eval(), models.batch(3, pad_to=12)
    for modality in ("image", "text"):
        run = torch.compile(model.encode_layers, fullgraph=True, backend="eager")
        want = model.encode_layers(modality, batch[modality], [0, -1], norm=True)
        for one, other in zip(run(modality, batch[modality], [0, -1], norm=True), want, strict=True):
            torch.testing.assert_close(one.tokens, other.tokens)
            torch.testing.assert_close(one.pooled, other.pooled)
    torch._dynamo.reset()


class _Maps(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model.feature_maps("image", image, layers=[-1, -2])


@pytest.mark.parametrize("name", ["class token", "convnext"])
@torch.no_grad()
def test_maps_compile_and_export(name):
    torch._dynamo.reset()
    encoder, pixels = encoder_of(name)
    model = _Maps(MultimodalModel(8, {"image": encoder})).eval()
    want = model(pixels)
    program = torch.export.export(model, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for found in (compiled(pixels), program.module()(pixels)):
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert program.module()(pixels.repeat(3, 1, 1, 1))[0].shape[0] == 6
    torch._dynamo.reset()


HALF = {torch.bfloat16: 0.03, torch.float16: 0.004}
"""Largest error of any coordinate of a unit vector, as the documentation states."""


@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", COMPILED)
@torch.no_grad()
def test_half_precision_embeds_within_the_tolerance_of_the_documentation(family, dtype):
    model, half = COMPILED[family]().eval(), COMPILED[family]().eval().to(dtype)
    batch = models.batch(16, pad_to=12)
    floats = Padded(model.encoders["image"].normalize(batch["image"].values))
    for modality, values in (("image", batch["image"]), ("image", floats), ("text", batch["text"])):
        want, got = model.embed(modality, values), half.embed(modality, values)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.norm(dim=-1), torch.ones(16))
        torch.testing.assert_close(got, want, rtol=0, atol=HALF[dtype])
        layers = half.encode_layers(modality, values, [0, -1], norm=True)
        assert all(layer.tokens.dtype == layer.pooled.dtype == dtype for layer in layers)
