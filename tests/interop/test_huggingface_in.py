"""What transformers saved, or published, gives the same embeddings here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mmpretrain import Padded, load
from mmpretrain.data.cleaning import CLEANERS
from mmpretrain.errors import InputError
from mmpretrain.interop.converted import build, expected, write
from mmpretrain.interop.huggingface_config import Towers, our_model
from mmpretrain.interop.huggingface_in import from_folder, from_weights
from mmpretrain.interop.names import check_keys
from tests.interop.huggingface_models import KINDS, TEXTS, pictures, saved, theirs

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: saved(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Any:
    """Copy one of the folders, to change something in it."""
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / kind))


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    for name, value in values.items():
        place = content
        for key in name.split("__")[:-1]:
            place = place[key]
        place[name.split("__")[-1]] = value
    file.write_text(json.dumps(content))


def batch(preprocess: Any) -> Padded:
    made = [preprocess(image) for image in pictures()]
    return preprocess.collate(made) if hasattr(preprocess, "collate") else Padded(torch.stack(made))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_texts_give_the_embeddings_that_transformers_gives(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = theirs(folders[kind], pictures(), TEXTS)
    model, preprocess, tokenizer = load(write(from_folder(folders[kind]), tmp_path / "ours"))
    texts = tokenizer(TEXTS)
    length = min(expected.ids.shape[1], texts.values.shape[1])
    assert torch.equal(texts.values[:, :length], expected.ids[:, :length])
    with torch.no_grad():
        assert distance(model.embed("image", batch(preprocess)), expected.image) <= 1e-5
        assert distance(model.embed("text", texts), expected.text) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_lie_in_shards_in_a_bin_file_or_beside_counters(kind: str, copy: Any, tmp_path: Path) -> None:
    folder = copy(kind)
    expected = from_folder(folder).weights
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    published = {
        **tensors,
        "text_model.embeddings.position_ids": torch.arange(24)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    torch.save(published, folder / "pytorch_model.bin")
    found = from_folder(folder).weights
    sharded = saved(tmp_path / "sharded", kind, max_shard_size="60KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    parts = from_folder(sharded).weights
    assert expected.keys() == found.keys() == parts.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(torch.equal(expected[name], parts[name]) for name in expected)


def test_half_precision_becomes_float32(copy: Any) -> None:
    folder = copy("clip")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x.half() for name, x in tensors.items()}, folder / "model.safetensors")
    assert {x.dtype for x in from_folder(folder).weights.values()} == {torch.float32}


@pytest.mark.parametrize(("kind", "wrong"), [("clip", "gelu"), ("siglip", "quick_gelu"), ("siglip2", "gelu")])
def test_a_wrong_activation_is_seen(kind: str, wrong: str, folders: dict[str, Path], copy: Any) -> None:
    expected = theirs(folders[kind], pictures(), TEXTS)
    folder = copy(kind)
    change(folder / "config.json", text_config__hidden_act=wrong, vision_config__hidden_act=wrong)
    converted = from_folder(folder)
    with torch.no_grad():
        found = build(converted).embed("text", Padded(expected.ids))
    assert distance(found, expected.text) > 1e-4


def test_missing_and_extra_weights_are_listed(copy: Any) -> None:
    folder = copy("clip")
    tensors = load_file(folder / "model.safetensors")
    taken = tensors.pop("text_model.encoder.layers.0.self_attn.k_proj.weight")
    save_file(tensors | {"text_model.strange": taken}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"no place for .*text_model\.strange; missing partners: none"):
        from_folder(folder)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"missing encoders\.text\.blocks\.0\.attention\.k\.weight"):
        build(from_folder(folder))
    lacking = {n: x for n, x in tensors.items() if n != "vision_model.encoder.layers.1.self_attn.q_proj.bias"}
    save_file(lacking, folder / "model.safetensors")
    with pytest.raises(
        InputError, match=r"missing partners: vision_model\.encoder\.layers\.1\.self_attn\.q_proj\.bias"
    ):
        from_folder(folder)


@pytest.mark.parametrize(
    ("kind", "file", "values", "message"),
    [
        ("clip", "config.json", {"model_type": "blip"}, "model_type is 'blip'; expected one of clip, siglip, siglip2"),
        ("clip", "config.json", {"text_config__hidden_act": "relu"}, "text_config.hidden_act is 'relu'"),
        ("clip", "config.json", {"vision_config__layer_norm_eps": 1e-3}, "layer_norm_eps 0.001"),
        ("clip", "config.json", {"text_config__eos_token_id": 7}, "pools at the id 7"),
        ("clip_legacy", "config.json", {"text_config__vocab_size": 600}, "largest id of a text"),
        ("siglip", "config.json", {"vision_config__vision_use_head": False}, "no pooling head"),
        ("siglip", "config.json", {"text_config__projection_size": 64}, "text head gives 64"),
        ("clip", "preprocessor_config.json", {"size": {"shortest_edge": 48}}, "neither a centre crop"),
        ("clip", "preprocessor_config.json", {"resample": 1}, "resample is 1"),
        ("clip", "preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
        ("siglip", "preprocessor_config.json", {"size": {"height": 64, "width": 64}}, "64x64; the model takes 32x32"),
        ("siglip", "tokenizer_config.json", {"padding_side": "left"}, "padded right"),
        ("clip", "tokenizer_config.json", {"truncation_side": "left"}, "cut right"),
        (
            "clip",
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": {"content": "cat"}}},
            "the id 5 to 'cat'",
        ),
        ("clip", "tokenizer.json", {"normalizer": None}, "in another way than CLIPTokenizer"),
        ("clip", "tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "in another way than CLIPTokenizer"),
        ("clip", "preprocessor_config.json", {"image_processor_type": "BlipImageProcessor"}, "is 'BlipImageProcessor'"),
        ("clip", "preprocessor_config.json", {"image_processor_type": "Siglip2ImageProcessor"}, "for clip expected"),
        ("clip", "preprocessor_config.json", {"do_pad": True}, "has do_pad=True"),
        ("clip", "preprocessor_config.json", {"do_flip_channel_order": True}, "do_flip_channel_order=True"),
        ("clip", "preprocessor_config.json", {"crop_pct": 0.9}, "has crop_pct=0.9"),
        ("clip", "preprocessor_config.json", {"crop_size": {"shortest_edge": 32}}, "neither a centre crop"),
        ("clip", "preprocessor_config.json", {"size": [32]}, "expected numbers, or sides by name"),
        ("clip", "preprocessor_config.json", {"resample": [3]}, "resample is"),
        ("clip", "preprocessor_config.json", {"image_mean": "grey"}, "image_mean is 'grey'"),
        ("clip", "config.json", {"model_type": ["clip"]}, r"model_type is \['clip'\]"),
        ("clip", "config.json", {"text_config": [1]}, r"text_config is \[1\]; expected names with values"),
        ("clip", "config.json", {"text_config": "abc"}, "text_config is 'abc'; expected names with values"),
        ("clip", "config.json", {"text_config__hidden_act": ["gelu"]}, "expected a name"),
        (
            "clip",
            "config.json",
            {"vision_config__hidden_size": "many"},
            "hidden_size is 'many'; expected a whole",
        ),
        ("clip", "config.json", {"vision_config__hidden_size": -4}, "expected a whole number from 1"),
        ("clip", "config.json", {"vision_config__num_attention_heads": 3}, "cannot share equally"),
        ("clip", "config.json", {"projection_dim": 1.5}, "projection_dim is 1.5"),
        ("clip", "config.json", {"vision_config__num_hidden_layers": 10**6}, r"has 1000000 layers .* the weights 2"),
    ],
)
def test_what_is_not_supported_is_named(kind: str, file: str, values: dict[str, Any], message: str, copy: Any) -> None:
    folder = copy(kind)
    change(folder / file, **values)
    with pytest.raises(InputError, match=message):
        from_folder(folder)


def test_sizes_that_no_memory_holds_are_refused_before_anything_is_built(copy: Any) -> None:
    folder = copy("clip")
    change(folder / "config.json", vision_config__intermediate_size=2**30, text_config__max_position_embeddings=2**30)
    with pytest.raises(InputError, match=r"wrong shapes .*1073741824"):
        build(from_folder(folder))


@pytest.mark.parametrize(
    "name", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"]
)
def test_image_processors_are_known_by_every_spelling_and_by_their_own_defaults(name: str, copy: Any) -> None:
    folder = copy("siglip")
    key = "feature_extractor_type" if name.endswith("Extractor") else "image_processor_type"
    content = {key: name, "size": 32, "crop_size": 32, "do_pad": False, "image_std": 0.5}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    found = from_folder(folder).config
    assert found["preprocess"]["resize"] == "crop"
    image = found["model"]["encoders"]["image"]
    assert image["mean"][0] == 0.48145466 and image["std"] == [0.5, 0.5, 0.5]


def test_a_config_that_is_nested_too_deeply_or_too_large_is_refused(copy: Any) -> None:
    folder = copy("clip")
    (folder / "config.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(InputError, match="is not JSON"):
        from_folder(folder)
    (folder / "config.json").write_text(" " * (2**24 + 1))
    with pytest.raises(InputError, match="expected at most 16777216"):
        from_folder(folder)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_file_that_is_not_there_is_named(file: str, copy: Any) -> None:
    folder = copy("clip")
    (folder / file).unlink()
    with pytest.raises(InputError, match=file):
        from_folder(folder)


def test_an_image_processor_may_lie_in_the_processors_file(copy: Any) -> None:
    folder = copy("clip")
    expected = from_folder(folder).config
    content = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    assert from_folder(folder).config == expected


def test_siglip_texts_are_cleaned_as_its_tokenizer_class_does(copy: Any, tmp_path: Path) -> None:
    folder = copy("siglip")
    change(folder / "tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    tokenizer = load(write(from_folder(folder), tmp_path / "ours")).tokenizer
    assert torch.equal(tokenizer(["It's a_B,  c!"]).values, tokenizer(["its ab c"]).values)
    assert CLEANERS["unpunctuated"](" It's a_B,\n c! ") == "its ab c"


def test_a_tokenizer_without_a_class_is_the_one_transformers_takes_for_the_model(copy: Any) -> None:
    folder = copy("siglip")
    change(folder / "tokenizer_config.json", tokenizer_class=None)
    assert from_folder(folder).config["tokenizer"]["clean"] == "unpunctuated"
    folder = copy("clip")
    change(folder / "tokenizer_config.json", tokenizer_class=None)
    change(folder / "tokenizer.json", normalizer=None)
    with pytest.raises(InputError, match="in another way than CLIPTokenizer"):
        from_folder(folder)


def test_published_configs_leave_out_what_is_usual() -> None:
    model = our_model(Towers({"model_type": "clip"}, "x"), 49407, [0.5] * 3, [0.5] * 3)
    assert model["encoders"]["image"]["model_args"]["embed_dim"] == 768
    assert model["encoders"]["text"]["activation"] == "quick_gelu"
    config = {"model_type": "siglip2", "text_config": {"vocab_size": 256000}, "vision_config": None}
    flexible = our_model(Towers(config, "x"), 1, [0.5] * 3, [0.5] * 3)
    assert flexible["encoders"]["image"]["model_args"]["pos_embed_grid_size"] == [16, 16]
    assert flexible["encoders"]["text"]["vocab_size"] == 256000
    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    config = {"model_type": "siglip", "text_config": so400m, "vision_config": {**so400m, "patch_size": 14}}
    sizes = our_model(Towers(config, "x"), 1, [0.5] * 3, [0.5] * 3)["encoders"]
    assert int(1152 * sizes["image"]["model_args"]["mlp_ratio"]) == round(1152 * sizes["text"]["mlp_ratio"]) == 4304
    old = {"model_type": "clip", "text_config": {"hidden_size": 64}, "text_config_dict": {"hidden_size": 256}}
    assert our_model(Towers(old, "x"), 49407, [0.5] * 3, [0.5] * 3)["encoders"]["text"]["width"] == 256


@pytest.mark.parametrize(
    ("kind", "text", "vision"),
    [
        ("CLIP", {}, {}),
        (
            "CLIP",
            {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
            LARGE | {"patch_size": 14},
        ),
        ("Siglip", {}, {}),
        ("Siglip", SO400M, SO400M | {"patch_size": 14, "image_size": 384}),
        ("Siglip2", {"vocab_size": 256000}, {}),
        ("Siglip2", SO400M | {"vocab_size": 256000}, SO400M),
    ],
)
def test_every_weight_of_the_released_sizes_has_its_place(kind: str, text: Any, vision: Any) -> None:
    """On the meta device: names and shapes alone."""
    made = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, projection_dim=768)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}Model")(made).state_dict()
    config = json.loads(made.to_json_string())
    weights = from_weights(theirs, config["model_type"], kind)
    eos_id = 49407 if kind == "CLIP" else 1
    check_keys(weights, expected(our_model(Towers(config, kind), eos_id, [0.5] * 3, [0.5] * 3)), kind)
