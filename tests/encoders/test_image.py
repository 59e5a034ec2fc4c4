"""The image encoder is timm's backbone with one return type."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch

from mmpretrain import (
    CascadedAttentionPool,
    Encoded,
    ImageEncoder,
    InputError,
    ParallelAttentionPool,
    SharedAttentionPool,
)
from tests.models import VIT


def pixels(size: int = 16, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("vit_tiny_patch16_224", VIT, 16),
        ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}, 16),
        ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "map"}, 16),
        ("convnext_atto", {}, 32),
        ("resnet18", {}, 32),
        ("resnet50_clip", {"img_size": 64}, 64),
        ("efficientnet_b0", {}, 32),
        ("swin_tiny_patch4_window7_224", {"img_size": 56}, 56),
    ],
)
def test_any_timm_backbone_keeps_the_contract(name, args, size):
    encoder = ImageEncoder(name, args).eval()
    encoded = encoder(pixels(size))
    assert isinstance(encoded, Encoded)
    assert encoded.pooled.shape == (2, encoder.width)
    assert encoded.tokens.ndim == 3 and encoded.tokens.shape[0] == 2
    assert encoded.mask is None


def test_pooled_is_what_timm_gives():
    encoder = ImageEncoder("vit_tiny_patch16_224", VIT).eval()
    with torch.no_grad():
        x = encoder.normalize(pixels())
        torch.testing.assert_close(encoder(pixels()).pooled, encoder.backbone(x))


def test_uint8_is_normalised_as_open_clip_does_and_float_is_taken_as_it_is():
    from PIL import Image

    image = Image.effect_noise((16, 16), 80).convert("RGB")
    transform = open_clip.image_transform(16, is_train=False)
    encoder = ImageEncoder("vit_tiny_patch16_224", VIT)
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)[None]
    torch.testing.assert_close(encoder.normalize(raw)[0], transform(image), rtol=0, atol=1e-6)
    assert encoder.normalize(raw.float()) is not None
    torch.testing.assert_close(encoder.normalize(raw.float()), raw.float())


def test_init_clip_draws_tables_by_width():
    torch.manual_seed(0)
    encoder = ImageEncoder("vit_base_patch32_224", init="clip")
    for parameter in (encoder.backbone.pos_embed, encoder.backbone.cls_token):
        assert parameter.std().item() == pytest.approx(768**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("pool", "tokens"), [(CascadedAttentionPool, 8), (ParallelAttentionPool, 8), (SharedAttentionPool, 7)]
)
def test_coca_pools(pool, tokens):
    encoder = ImageEncoder("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": ""}, pool(24, 2, 8, 32))
    encoded = encoder(pixels())
    assert encoded.pooled.shape == (2, 24) and encoded.tokens.shape == (2, tokens, 24) and encoder.width == 24


def test_256_queries_feed_256_tokens_in_the_paper_and_255_in_released_weights():
    x = torch.randn(1, 4, 32)
    assert CascadedAttentionPool(32, 2)(x).tokens.shape[1] == 256
    assert SharedAttentionPool(32, 2)(x).tokens.shape[1] == 255


def test_cascaded_pool_reads_the_caption_tokens_and_parallel_does_not():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 32)
    for pool, moves in ((CascadedAttentionPool(32, 2, 4), True), (ParallelAttentionPool(32, 2, 4), False)):
        before = pool(x).pooled
        with torch.no_grad():
            pool.caption.attention.o.bias += torch.randn(32)
        assert bool((pool(x).pooled - before).abs().max() > 1e-4) is moves


def test_patch_dropout_is_a_training_matter():
    encoder = ImageEncoder("vit_tiny_patch16_224", {**VIT, "img_size": 32, "patch_drop_rate": 0.5})
    assert encoder.train()(pixels(32)).tokens.shape[1] < encoder.eval()(pixels(32)).tokens.shape[1]


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = ImageEncoder("vit_tiny_patch16_224", VIT, gradient_checkpointing=checkpointing).double().train()
        encoder(pixels().double() / 255).pooled.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-12)


def test_wrong_names_sizes_and_arguments_say_what_to_change():
    with pytest.raises(InputError, match="vit_tiny_patch16_224"):
        ImageEncoder("vit_tiny_patch16_244")
    with pytest.raises(InputError, match="refuses model_args"):
        ImageEncoder("resnet18", {"no_such_argument": 1})
    encoder = ImageEncoder("vit_tiny_patch16_224", VIT)
    with pytest.raises(InputError, match=r"32x32.*16x16"):
        encoder(pixels(32))
    with pytest.raises(InputError, match=r"B,C,H,W"):
        encoder(pixels()[0])


def test_channels_last_maps_become_tokens_of_the_right_width():
    encoder = ImageEncoder("swin_tiny_patch4_window7_224", {"img_size": 56}).eval()
    assert encoder(pixels(56)).tokens.shape == (2, 4, 768)


def test_model_args_cannot_name_files_of_weights():
    with pytest.raises(InputError, match="checkpoint_path"):
        ImageEncoder("resnet18", {"checkpoint_path": "x.pth"})


def test_timm_default_head_width_matches_for_every_pooling():
    for pooling in ("token", "avg", "map"):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**VIT, "global_pool": pooling})
        assert ImageEncoder("vit_tiny_patch16_224", {**VIT, "global_pool": pooling}).width == model.head_hidden_size
