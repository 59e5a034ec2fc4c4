"""OpenAI's CLIP converts from its weights alone, with the embeddings of the original."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from mmpretrain.config import build_saved
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.errors import InputError
from mmpretrain.interop.converted import build, write
from mmpretrain.interop.names import check_keys, to_theirs
from mmpretrain.interop.open_clip_names import PATCHES, RESNET, SCALARS, VIT, text, text_projection, vit_norm
from mmpretrain.interop.openai import from_state_dict
from mmpretrain.pretrained import load
from tests.interop.openai_models import CONTEXT, EMBED, EXTRAS, SIZES, embeddings, released, tiny_clip

TEXTS = ["a photo of a cat", "two dogs in the snow at night", "x"]
PUBLISHED = {
    # open_clip's config: image size, embed_dim, parameters in millions (Radford et al. 2021, table 20)
    "RN50": (224, 1024, 102.0),
    "RN101": (224, 512, 119.7),
    "RN50x4": (288, 640, 178.3),
    "RN50x16": (384, 768, 291.0),
    "RN50x64": (448, 1024, 623.3),
    "ViT-B-32": (224, 512, 151.3),
    "ViT-B-16": (224, 512, 149.6),
    "ViT-L-14": (224, 768, 427.6),
    "ViT-L-14-336": (336, 768, 427.9),
}


def pixels(kind: str) -> torch.Tensor:
    size = SIZES[kind]["image_size"]
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(5))


def ids() -> torch.Tensor:
    return ClipTokenizer(CONTEXT, pad="context_length")(TEXTS).values


def difference(theirs, ours, kind) -> tuple[float, float]:
    expected = embeddings(theirs, pixels(kind), ids())
    with torch.no_grad():
        found = ours.embed("image", pixels(kind)), ours.embed("text", ClipTokenizer(CONTEXT)(TEXTS))
    return tuple(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("kind", SIZES)
def test_half_precision_weights_give_the_embeddings_of_the_original(kind):
    from open_clip.model import convert_weights_to_fp16

    original = tiny_clip(kind)
    convert_weights_to_fp16(original)
    converted = from_state_dict(original.state_dict() | EXTRAS)
    assert {x.dtype for x in converted.weights.values()} <= {torch.float32, torch.int64}
    image, text = difference(original.float(), build(converted), kind)
    assert image < 1e-5
    assert text < 1e-5


@pytest.mark.parametrize("kind", SIZES)
def test_the_wrong_activation_would_have_been_seen(kind):
    exact = tiny_clip(kind, quick_gelu=False)
    image, text = difference(exact, build(from_state_dict(released(exact))), kind)
    assert text > 1e-4
    assert image > 1e-4 or kind == "resnet"  # which has no GELU


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_published_sizes_are_read_off_the_shapes(name):
    import open_clip
    from open_clip.model import CLIP

    size, embed_dim, millions = PUBLISHED[name]
    with torch.device("meta"):
        config = open_clip.get_model_config(name)
        shapes = released(CLIP(**{**config, "quick_gelu": True}))
        converted = from_state_dict(shapes, name)
        model = build_saved(converted.config["model"])
    check_keys(converted.weights, model.state_dict(), name)
    assert converted.config["preprocess"]["image_size"] == size
    assert converted.config["tokenizer"]["context_length"] == 77
    assert model.embed_dim == embed_dim
    assert math.isclose(sum(p.numel() for p in model.parameters()) / 1e6, millions, abs_tol=0.06)


@pytest.mark.parametrize("kind", SIZES)
def test_there_and_back_is_the_same_to_the_bit(kind):
    original = tiny_clip(kind).state_dict()
    image = RESNET if kind == "resnet" else [*VIT, *PATCHES, *vit_norm()]
    back = to_theirs(
        from_state_dict(original | EXTRAS).weights, [*image, *text(), *text_projection(), *SCALARS], "OpenAI's layout"
    )
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


def test_a_converted_model_is_a_folder_like_any_other(tmp_path):
    original = tiny_clip("resnet")
    model, preprocess, tokenizer = load(write(from_state_dict(released(original)), tmp_path / "model"))
    assert max(difference(original, model, "resnet")) < 1e-5
    assert preprocess.image_size == 64
    assert tokenizer.context_length == CONTEXT


def test_what_is_missing_extra_or_of_another_shape_is_named():
    weights = released(tiny_clip("vit"))
    lacking = {name: x for name, x in weights.items() if name not in ("ln_final.bias", "visual.ln_pre.weight")}
    with pytest.raises(InputError, match=r"mine does not fit .*missing .*norm_pre.weight, .*text.norm.bias"):
        build(from_state_dict(lacking, "mine"))
    with pytest.raises(InputError, match=r"mine: no place for visual\.head\.weight"):
        from_state_dict(weights | {"visual.head.weight": torch.zeros(2)}, "mine")
    with pytest.raises(
        InputError, match=rf"wrong shapes projections.text.weight \({EMBED}, 7\) instead of \({EMBED}, 64\)"
    ):
        build(from_state_dict(weights | {"text_projection": torch.zeros(7, EMBED)}, "mine"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"visual.conv1.weight": torch.zeros(3)}, r"visual.conv1.weight has shape \(3,\); expected 4 dimensions"),
        ({"visual.conv1.weight": torch.zeros(100, 3, 8, 8)}, "width 100 .* multiple of 64"),
        ({"visual.positional_embedding": torch.zeros(16, 64)}, "15 positions .* a square"),
        ({"token_embedding.weight": torch.zeros(1000, 64)}, "1000 token ids .* tokenizer of its own"),
    ],
)
def test_shapes_of_no_clip_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        from_state_dict(released(tiny_clip("vit")) | change)


def test_weights_of_open_clip_under_the_same_names_are_refused():
    weights = tiny_clip("vit", quick_gelu=False).state_dict()
    with pytest.raises(InputError, match=r"mine has no half-precision weights and none of .*open_clip:NAME --weights"):
        from_state_dict(weights, "mine")
    from_state_dict({name: x.half() for name, x in weights.items()}, "mine")


def test_weights_of_another_kind_are_refused():
    with pytest.raises(InputError, match=r"neither visual\.proj .*give open_clip:NAME"):
        from_state_dict({"vision_model.post_layernorm.weight": torch.zeros(2)})
    weights = released(tiny_clip("vit"))
    with pytest.raises(InputError, match=r"lacks token_embedding\.weight"):
        from_state_dict({name: x for name, x in weights.items() if not name.startswith("token_embedding")})


@pytest.mark.parametrize("mode", ["RGB", "LA", "P", "I;16"])
def test_pictures_are_prepared_as_the_original_does(mode, tmp_path):
    from open_clip.transform import image_transform

    config = from_state_dict(released(tiny_clip("vit"))).config["preprocess"]
    bands = torch.randint(0, 256, (45, 71, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy()
    if mode == "I;16":
        picture = Image.fromarray(bands[..., 0].astype("uint16") * 200)
    else:
        picture = Image.fromarray(bands).convert(mode)
    turned = Image.Exif()
    turned[0x0112] = 6  # on its side
    picture.save(tmp_path / "x.png", exif=turned)
    theirs = image_transform(32, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    with Image.open(tmp_path / "x.png") as opened:
        expected = (theirs(opened) * 255).round().to(torch.uint8)
    with Image.open(tmp_path / "x.png") as opened:
        assert torch.equal(build_saved(config)(opened), expected)
