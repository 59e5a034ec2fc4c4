"""Pictures of any shape in one batch: the canvas they stand on changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmpretrain import InputError, MultimodalModel, NaFlexImageEncoder, TextEncoder
from mmpretrain.data.naflex import on_canvas
from mmpretrain.encoders.naflex import _stretched
from mmpretrain.evaluation.embed import embed_images

ARGS = {
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "pos_embed_grid_size": [6, 6],
}


def encoder(seed: int = 0) -> NaFlexImageEncoder:
    torch.manual_seed(seed)
    return NaFlexImageEncoder(model_args=ARGS).eval()


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = [(8, 40), (40, 8), (24, 24), (12, 20)]
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def test_each_picture_of_a_batch_is_encoded_as_if_alone() -> None:
    model, images = encoder(), pictures()
    with torch.no_grad():
        together = model(*on_canvas(images, 4)[:2])
        for row, image in enumerate(images):
            alone = model(image[None])
            grid = together.tokens[row].view(10, 10, 32)[: image.shape[1] // 4, : image.shape[2] // 4]
            torch.testing.assert_close(together.pooled[row], alone.pooled[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(grid.flatten(0, 1), alone.tokens[0], rtol=0, atol=2e-6)
    assert torch.equal(together.mask.sum(1), torch.tensor([20, 20, 36, 15]))


@pytest.mark.parametrize("padding", [(0, 0), (200, 1), (4, 40)])
def test_padding_is_never_read(padding: tuple[int, int]) -> None:
    model, image = encoder(), pictures()[2]
    generator = torch.Generator().manual_seed(5)
    canvas = torch.randint(
        0, 256, (1, 3, 24 + 4 * padding[0], 24 + 4 * padding[1]), generator=generator, dtype=torch.uint8
    )
    canvas[0, :, :24, :24] = image
    mask = torch.zeros(1, 6 + padding[0], 6 + padding[1], dtype=torch.bool)
    mask[:, :6, :6] = True
    with torch.no_grad():
        alone, padded = model(image[None]).pooled, model(canvas, mask.flatten(1)).pooled
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (3, 11), (13, 2), (1, 40), (7, 5)])
def test_positions_are_stretched_as_torch_stretches_pictures(rows: int, columns: int) -> None:
    table = torch.randn(6, 6, 8, dtype=torch.float64)
    expected = F.interpolate(
        table.permute(2, 0, 1)[None].float(), (rows, columns), mode="bilinear", align_corners=False, antialias=True
    )
    across = _stretched(torch.arange(rows)[None], torch.tensor([[rows]]), 6)[0]
    along = _stretched(torch.arange(columns)[None], torch.tensor([[columns]]), 6)[0]
    found = torch.einsum("yg,xh,ghd->dyx", across, along, table.float())
    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-6)


def test_timm_gives_the_same_for_whole_canvases() -> None:
    model = encoder()
    images = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images).pooled, model.backbone(images), rtol=0, atol=1e-5)


def test_gradients_reach_the_positions_and_no_padding() -> None:
    model = encoder().train()
    values, mask, _ = on_canvas([picture.float() / 255 for picture in pictures()], 4)
    values.requires_grad_(True)
    model(values, mask).pooled.sum().backward()
    assert model.backbone.embeds.pos_embed.grad.abs().sum() > 0
    real = mask.view(4, 10, 10).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(values)
    assert values.grad[real].abs().sum() > 0 and not values.grad[~real].any()


def test_recomputed_activations_change_nothing() -> None:
    torch.manual_seed(0)
    model = NaFlexImageEncoder(model_args=ARGS, gradient_checkpointing=True)
    values, mask, _ = on_canvas(pictures(), 4)
    torch.testing.assert_close(model.train()(values, mask).pooled, encoder()(values, mask).pooled)


def test_it_is_an_encoder_of_the_model() -> None:
    text = TextEncoder(50, 12, 32, 1, 2, 49)
    model = MultimodalModel(16, {"image": encoder(), "text": text})
    assert model.embed("image", on_canvas(pictures(), 4)).shape == (4, 16)


def test_a_data_set_of_any_shapes_is_embedded() -> None:
    model = MultimodalModel(16, {"image": encoder()}).eval()
    images = pictures()
    found = embed_images(model, list(zip(images, range(4), strict=True)), batch_size=3).embeddings
    with torch.no_grad():
        expected = torch.cat([model.embed("image", image[None]) for image in images])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_float_pixels_get_the_encoders_dtype() -> None:
    model = encoder().to(torch.bfloat16)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 8, 8)).pooled.dtype == torch.bfloat16


def test_wrong_input_is_named() -> None:
    model = encoder()
    with pytest.raises(InputError, match="multiples of 4"):
        model(torch.zeros(1, 3, 10, 8))
    with pytest.raises(InputError, match=r"mask of shape \(1, 3\); expected \(1, 4\)"):
        model(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, dtype=torch.bool))
    holes = torch.tensor([[True, False, True, True], [False, True, False, True]])
    for mask in holes:
        with pytest.raises(InputError, match="no rectangle"):
            model(torch.zeros(1, 3, 8, 8), mask[None])


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vit_tiny_patch16_224", {}, "no NaFlexVit"),
        ("naflexvit_base_patch16_siglip", {**ARGS, "class_token": True}, "class or register tokens"),
        ("naflexvit_base_patch16_siglip", {**ARGS, "pos_embed_interp_mode": "bicubic"}, "bilinearly"),
        ("naflexvit_base_patch16_siglip", {**ARGS, "pos_embed": "factorized"}, "not learned"),
    ],
)
def test_backbones_that_do_something_else_are_refused(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NaFlexImageEncoder(name, args)
