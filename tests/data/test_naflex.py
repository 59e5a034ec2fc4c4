"""Pictures keep their shape and fill their budget of patches."""

from __future__ import annotations

import io
import math
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmpretrain import InputError
from mmpretrain.data.naflex import MAX_SCALE, NaFlexPreprocess, fitting_size, on_canvas
from tests.data.odd_pictures import odd_pictures
from tests.data.photos import photo

BUDGETS = (64, 256, 1024)


def patches(height: int, width: int, scale: float, size: int) -> int:
    return max(math.ceil(height * scale / size), 1) * max(math.ceil(width * scale / size), 1)


def check(height: int, width: int, size: int, budget: int) -> None:
    """The size fits the budget and is that of one scale; a scale one percent larger does not fit."""
    rows, columns = (side // size for side in fitting_size(height, width, size, budget))
    assert 1 <= rows * columns <= budget
    # The scales that give these sides lie between the two bounds of each side.
    low = max((rows - 1) * size / height, (columns - 1) * size / width)
    high = min(rows * size / height, columns * size / width, MAX_SCALE)
    assert low < high * (1 + 1e-9)
    if high < MAX_SCALE * 0.99:
        assert patches(height, width, high * 1.01, size) > budget


def test_a_thousand_sizes_fit_each_budget_and_none_could_be_larger() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        height, width = draw.randint(8, 4000), draw.randint(8, 4000)
        for budget in BUDGETS:
            check(height, width, 16, budget)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([8, 14, 16, 32]), st.sampled_from([1, 7, *BUDGETS]))
def test_any_size_fits_any_budget(height: int, width: int, size: int, budget: int) -> None:
    rows, columns = (side // size for side in fitting_size(height, width, size, budget))
    assert 1 <= rows * columns <= budget


@pytest.mark.parametrize(("width", "height"), [(640, 427), (100, 300), (16, 900), (31, 31)])
@pytest.mark.parametrize("budget", BUDGETS)
def test_transformers_makes_the_same_size(width: int, height: int, budget: int) -> None:
    siglip2 = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    expected = siglip2.get_image_size_for_max_num_patches(height, width, 16, budget)
    assert fitting_size(height, width, 16, budget) == tuple(expected)


def test_pixels_equal_those_of_transformers_on_files_of_every_kind() -> None:
    siglip2 = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    options = {"do_convert_rgb": True, "do_normalize": False, "do_rescale": False}
    theirs = siglip2.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=64, **options)
    ours = NaFlexPreprocess(8, 64, read="rgb")
    for name, data in odd_pictures().items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, on transparency in palettes
            image = Image.open(io.BytesIO(data))
            pixels = ours(image)
            found = theirs(image, return_tensors="pt")
        rows, columns = found["spatial_shapes"][0].tolist()
        patches = found["pixel_values"][0, : rows * columns].view(rows, columns, 8, 8, 3)
        expected = patches.permute(4, 0, 2, 1, 3).reshape(3, rows * 8, columns * 8)
        assert torch.equal(pixels.float(), expected.float()), name


def test_pixels_are_whole_patches_and_repeatable() -> None:
    preprocess = NaFlexPreprocess(patch_size=16, max_patches=64)
    pixels = preprocess(photo(300, 100))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 64, 192)
    assert torch.equal(pixels, preprocess(photo(300, 100)))


def test_canvases_hold_every_picture_at_the_top_left() -> None:
    preprocess = NaFlexPreprocess(patch_size=8, max_patches=30)
    made = [preprocess(photo(*size)) for size in ((90, 30), (30, 90), (50, 50))]
    values, mask, _ = preprocess.collate(made)
    assert values.dtype == torch.uint8
    grid = mask.view(3, values.shape[2] // 8, values.shape[3] // 8)
    for row, picture in enumerate(made):
        height, width = picture.shape[1:]
        assert torch.equal(values[row, :, :height, :width], picture)
        assert not values[row, :, height:].any() and not values[row, :, :, width:].any()
        assert grid[row, : height // 8, : width // 8].all() and int(grid[row].sum()) == height * width // 64


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="max_patches=0"):
        NaFlexPreprocess(max_patches=0)
    with pytest.raises(InputError, match="interpolation='nearest'"):
        NaFlexPreprocess(interpolation="nearest")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one"):
        on_canvas([], 16)
    with pytest.raises(InputError, match="multiples of 16"):
        on_canvas([torch.zeros(3, 16, 20)], 16)
