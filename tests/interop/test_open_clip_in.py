from __future__ import annotations

import functools
import json
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mmpretrain import InputError, Padded, load
from mmpretrain.config import build_saved
from mmpretrain.interop.converted import build as build_ours
from mmpretrain.interop.converted import write
from mmpretrain.interop.names import to_theirs
from mmpretrain.interop.open_clip_config import describe
from mmpretrain.interop.open_clip_in import from_config, from_name, packaged
from tests.interop.open_clip_models import both, errors, register_trunks, tokenized, word_tokenizer

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
TANH = {"act_kwargs": {"approximate": "tanh"}}
SIGLIP = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}


def native(vision=None, text=None, **rest):
    return {"embed_dim": 16, "vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {}), **rest}


def on_timm(name, pool, projection, text=None, embed_dim=16, size=32, **rest):
    vision = {"image_size": size, "timm_model_name": name, "timm_pool": pool, "timm_proj": projection}
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": TEXT | (text or {}), **rest}


CUSTOM = {"custom_text": True}
MODELS = {
    "vit": native(),
    "vit-quickgelu": native(quick_gelu=True),
    "vit-custom-text": native(**CUSTOM),
    "vit-average-norm-behind": native({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}),
    "vit-average": native({"pool_type": "avg", "patch_dropout": 0.5}),
    "vit-layer-scale": native({"ls_init_value": 1e-4}),
    "vit-attention-pool": native({"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}),
    "vit-norms-of-1e-6": native({"norm_kwargs": {"eps": 1e-6}, "mlp_ratio": 3.7362}, {"mlp_ratio": 3.7362}),
    "vit-tanh": native(TANH, TANH),
    "vit-text-without-projection": native(text={"proj_type": "none", "width": 16}, **CUSTOM),
    "vit-sine-positions": native({"pos_embed_type": "sin_cos_2d"}),
    "resnet": native({"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 64}, quick_gelu=True),
    "timm-siglip": on_timm("tiny_siglip", "map", "none", SIGLIP, 32, **CUSTOM, init_logit_bias=-10),
    "timm-siglip2": on_timm(
        "tiny_siglip",
        "map",
        "none",
        SIGLIP | {"act_kwargs": {"approximate": "tanh"}},
        32,
        **CUSTOM,
        init_logit_bias=-10,
    ),
    "timm-clip": on_timm("tiny_clip", "token", None, {"no_causal_mask": True}, **CUSTOM),
    "timm-gap": on_timm("tiny_gap", "", "linear"),
    "timm-relpos": on_timm("tiny_relpos", "", "linear"),
    "timm-eva02": on_timm("tiny_eva02", "token", None, **CUSTOM),
    "timm-pe": on_timm("tiny_pe", "map", None, **CUSTOM),
    "timm-convnext": on_timm("tiny_convnext", "", "linear", size=64),
    "timm-convnext-average": on_timm("tiny_convnext", "avg", "linear", size=64),
    "timm-convnext-mlp": on_timm("tiny_convnext", "", "mlp", size=64),
    "timm-vitamin": on_timm("tiny_vitamin", "", "linear", **CUSTOM),
    "timm-mobileclip": on_timm("tiny_mci", "avg", None, {"no_causal_mask": True}, size=64, **CUSTOM),
    "timm-swin": on_timm("tiny_swin", "", "linear", size=56),
}
TOKENIZERS = {
    "clipa": ("<s> $A </s>", {"pad_token": "<s>", "sep_token": "</s>"}),
    "worldwide": ("<s> $A </s>", {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}),
    "siglip": ("$A </s>", {"pad_token": "</s>", "eos_token": "</s>"}),
}
OTHER_TOKENIZERS = {
    "clipa": {"pool_type": "last", "no_causal_mask": True, "tokenizer_kwargs": {"strip_sep_token": True}},
    "worldwide": {"pool_type": "eos", "eos_id": 2},
    "siglip": SIGLIP | {"tokenizer_kwargs": {"clean": "canonicalize"}},
}
ROBERTA = {"model_type": "roberta", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 1}
ROBERTA |= {"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40, "type_vocab_size": 1}
MT5 = {"model_type": "mt5", "vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
MT5 |= {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "pad_token_id": 1, "tie_word_embeddings": False}
M2M = {"model_type": "m2m_100", "vocab_size": 64, "d_model": 32, "pad_token_id": 1, "is_encoder_decoder": True}
for side in ("encoder", "decoder"):
    M2M |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 48}
HUGGINGFACE = {
    "roberta-mean": (ROBERTA, {}),
    "roberta-first": (ROBERTA, {"hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "linear"}),
    "xlm-roberta": (ROBERTA | {"model_type": "xlm-roberta"}, {}),
    "bert-pooler": (ROBERTA | {"model_type": "bert", "pad_token_id": 1}, {"hf_pooler_type": "cls_pooler"}),
    "mt5": (MT5, {}),
    "nllb": (M2M, {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}),
}


@pytest.fixture(scope="module", autouse=True)
def trunks():
    register_trunks()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def pair_of(name):
    """One of `MODELS` in both libraries, for tests that change nothing in it."""
    return both(MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_pictures_and_texts_have_open_clips_embeddings(name):
    config, pair = MODELS[name], pair_of(name)
    found = errors(pair, config["vision_cfg"]["image_size"], *tokenized(pair, config))
    assert max(found) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_names_go_back_to_the_bit(name):
    pair = pair_of(name)
    back = to_theirs(pair.ours.state_dict(), describe(MODELS[name]).table, name)
    given = pair.theirs.state_dict()
    assert back.keys() == given.keys()
    assert all(torch.equal(back[key], given[key]) for key in given)


@pytest.mark.parametrize("name", OTHER_TOKENIZERS)
def test_texts_of_another_tokenizer_have_open_clips_ids_and_embeddings(name, tmp_path):
    folder = word_tokenizer(tmp_path, *TOKENIZERS[name])
    config = native(text={"vocab_size": 64, "hf_tokenizer_name": str(folder), **OTHER_TOKENIZERS[name]}, **CUSTOM)
    pair = both(config, folder)
    ids, texts = tokenized(pair, config)
    length = texts.values.shape[1]
    assert texts.values.tolist() == ids[:, :length].tolist()
    assert max(errors(pair, 32, ids, texts)) < 1e-5


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_hugging_face_texts_have_open_clips_embeddings(name, tmp_path):
    pytest.importorskip("transformers")
    model, options = HUGGINGFACE[name]
    folder = word_tokenizer(tmp_path, *TOKENIZERS["worldwide"])
    text = {"hf_model_name": "the/model", "hf_tokenizer_name": str(folder), "context_length": 20, **options}
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}
    pair = both(config, folder, {"the/model": model})
    assert max(errors(pair, 32, *tokenized(pair, config))) < 1e-5


def coca(width=32, **vision):
    pool = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True}
    config = native(pool | vision, {"embed_cls": True, "output_tokens": True, "context_length": 11}, **CUSTOM)
    decoder = {"context_length": 11, "width": 32, "heads": 2, "layers": 2, "vocab_size": 49408}
    return config | {"embed_dim": 32, "multimodal_cfg": decoder, "vision_cfg": config["vision_cfg"] | {"width": width}}


COCA = {
    "released": coca(48, head_width=24),
    "equal widths": coca(),
    "no pooler": coca(attentional_pool=False),
    "quickgelu": coca() | {"quick_gelu": True},
}


@pytest.mark.parametrize("name", COCA)
def test_coca_has_open_clips_embeddings_and_caption_logits(name):
    pair = both(COCA[name])
    ids, texts = tokenized(pair, COCA[name])
    assert max(errors(pair, 32, ids, texts)) < 1e-5
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        theirs = pair.theirs(images, ids)["logits"]
        encoded = {"image": pair.ours.encode("image", images), "text": pair.ours.encode("text", texts)}
        ours = pair.ours.fusion(encoded)["text"] @ pair.ours.heads["caption"].weight.T
    asked = texts.mask[:, 1:]
    assert float((ours[:, :-1] - theirs)[asked].abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["parallel", "cascade"])
def test_coca_with_two_poolers_converts(kind):
    config = coca(attentional_pool=kind)
    pair = both(config)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled, tokens = pair.theirs.visual(images)
        encoded = pair.ours.encode("image", images)
        embedded = pair.ours.embed("image", images)
    assert float((encoded.tokens - tokens).abs().max()) < 1e-5
    assert float((embedded - torch.nn.functional.normalize(pooled[:, 0], dim=-1)).abs().max()) < 1e-5


def test_half_precision_weights_without_a_bias_and_old_extras_convert():
    config, pair = MODELS["timm-siglip"], pair_of("timm-siglip")
    weights = {name: x.half() for name, x in pair.theirs.state_dict().items() if name != "logit_bias"}
    weights["text.transformer.embeddings.position_ids"] = torch.arange(4)
    made = from_config(config, weights)
    assert all(x.dtype == torch.float32 for x in made.weights.values())
    assert made.weights["logit_bias"].tolist() == [0.0]


def test_counters_of_batch_norm_are_carried_as_integers():
    pair = pair_of("timm-mobileclip")
    counters = [x for name, x in pair.made.weights.items() if name.endswith("num_batches_tracked")]
    assert counters
    assert all(x.dtype == torch.int64 for x in counters)


def test_weights_of_the_other_class_convert_by_the_names_they_have():
    config, pair = MODELS["vit-custom-text"], pair_of("vit-custom-text")
    plain = {name.removeprefix("text."): x for name, x in pair.theirs.state_dict().items()}
    assert from_config(config, plain).weights.keys() == pair.made.weights.keys()


@pytest.fixture
def folder(tmp_path):
    config = MODELS["vit"]
    settings = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    content = {"model_cfg": config, "preprocess_cfg": settings}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    save_file(pair_of("vit").theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


def test_a_folder_saved_by_open_clip_converts_with_its_preprocessing(folder):
    made = from_name(str(folder))
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    picture = build_saved(made.config["preprocess"])(image := _picture())
    with torch.no_grad():
        expected = theirs.eval().encode_image(transform(image)[None], normalize=True)
        ours = build_ours(made).embed("image", picture[None])
    assert float((ours - expected).abs().max()) < 1e-5
    assert made.config["preprocess"]["resize"] == "squash"


def _picture():
    from PIL import Image

    noise = torch.randint(0, 256, (61, 47, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.numpy())


@pytest.mark.parametrize("name", ["vit-average-norm-behind", "resnet", "timm-convnext-mlp", "timm-mobileclip"])
def test_a_converted_model_is_saved_and_loaded_to_the_bit(name, tmp_path):
    pair = pair_of(name)
    loaded, _, tokenizer = load(write(pair.made, tmp_path / "model"))
    given = pair.ours.state_dict()
    assert all(torch.equal(x, given[key]) for key, x in loaded.state_dict().items())
    with torch.no_grad():
        texts = tokenizer(["a photo", "of two cats"])
        assert torch.equal(loaded.embed("text", texts), pair.ours.embed("text", texts))


def test_a_hugging_face_text_encoder_is_saved_with_its_config_and_tokenizer(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer").mkdir()
    folder = word_tokenizer(tmp_path / "tokenizer", *TOKENIZERS["worldwide"])
    text = {"hf_model_name": "the/model", "hf_tokenizer_name": "the/model", "context_length": 20}
    pair = both({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}, folder, {"the/model": ROBERTA})
    saved = write(pair.made, tmp_path / "model")
    shutil.rmtree(folder)
    loaded, _, tokenizer = load(saved)
    with torch.no_grad():
        texts = tokenizer(["a photo of the red cat", "two"])
        assert torch.equal(loaded.embed("text", texts), pair.ours.embed("text", texts))


def test_a_tokenizer_for_a_config_that_has_clips_own_is_refused(folder):
    (folder / "tokenizer.json").write_text("{}")  # repositories on the hub have one beside such a model
    assert from_name(str(folder)).config["tokenizer"]["_target_"].endswith("ClipTokenizer")
    with pytest.raises(InputError, match=r"has CLIP's own tokenizer.*leave --tokenizer out"):
        from_name(str(folder), tokenizer=folder)


def test_a_tag_says_how_its_weights_take_pictures():
    _, settings = packaged("ViT-L-14-CLIPA/datacomp1b")
    assert (settings["resize_mode"], settings["interpolation"]) == ("squash", "bilinear")
    config, _ = packaged("ViT-B-32/openai")
    assert config["quick_gelu"] is True
    assert packaged("ViT-B-16-SigLIP")[1]["mean"] == (0.5, 0.5, 0.5)
    assert packaged("ViT-B/32")[0]["embed_dim"] == 512


REFUSED = {
    r"vision_cfg\.qk_norm=True": native({"qk_norm": True}),
    r"text_cfg\.ls_init_value": native(text={"ls_init_value": 0.1}),
    r"vision_cfg\.something='new'": native({"something": "new"}),
    r"text_cfg\.pool_type='first'": native(text={"pool_type": "first"}),
    r"vision_cfg\.pool_type='none'": native({"pool_type": "none"}),
    r"text_cfg\.pool_type='argmax'.*CLIP's vocabulary": native(text={"vocab_size": 100}),
    r"vision_cfg\.timm_pool='rot_attn'": on_timm("tiny_convnext", "rot_attn", ""),
    r"vision_cfg\.timm_pool='avg'.*only without": on_timm("tiny_clip", "avg", "linear"),
    r"timm .* has no such model": on_timm("local-dir:here", "avg", "linear"),
    r"text_cfg\.act_kwargs": native(text={"act_kwargs": {"inplace": True}}),
    r"embed_dim=16.*no projection": on_timm("tiny_siglip", "map", "none"),
    r"lacks embed_dim": {"vision_cfg": {}},
    r"image tokens of 48": coca(48, head_width=24, attentional_pool=False),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_feature_that_is_missing_is_named(message):
    with pytest.raises(InputError, match=message):
        from_config(REFUSED[message], {})


def test_tensors_and_files_that_do_not_fit_are_named(folder):
    weights = dict(pair_of("vit").theirs.state_dict())
    with pytest.raises(InputError, match=r"open_clip:x.*no place for extra"):
        from_config(MODELS["vit"], weights | {"extra": torch.zeros(1)}, name="x")
    with pytest.raises(InputError, match=r"are of OpenAI .*give openai: --weights FILE"):
        from_config(MODELS["vit"], weights | {"input_resolution": torch.tensor(32)})
    del weights["visual.proj"]
    with pytest.raises(InputError, match=r"missing projections\.image\.weight"):
        from_config(MODELS["vit"], weights)
    with pytest.raises(InputError, match="packages no config 'ViT-Q'"):
        from_name("ViT-Q")
    with pytest.raises(InputError, match="no weights 'gone' of ViT-B-32"):
        from_name("ViT-B-32/gone")
    with pytest.raises(InputError, match="give a file with --weights"):
        from_name("ViT-B-32")
    with pytest.raises(InputError, match=r"preprocess_cfg\.resize_mode='stretch'"):
        from_config(MODELS["vit"], pair_of("vit").theirs.state_dict(), {"resize_mode": "stretch"})
    with pytest.raises(InputError, match=r"preprocess_cfg: mean is \[0\.5\]; expected one number, or three"):
        from_config(MODELS["vit"], pair_of("vit").theirs.state_dict(), {"mean": [0.5]})
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(InputError, match="has no model_cfg"):
        from_name(str(folder))


@pytest.mark.parametrize(
    ("section", "field", "value", "said"),
    [
        ("", "text_cfg", [1], r"text_cfg is \[1\]; expected names with values"),
        ("", "embed_dim", "512", "lacks embed_dim"),
        ("", "init_logit_bias", "low", "config.init_logit_bias is 'low'; expected int or float, or null"),
        ("vision_cfg", "width", None, "vision_cfg.width is None; expected a whole number from 1"),
        ("vision_cfg", "head_width", 0, "vision_cfg.head_width is 0; expected a whole number from 1"),
        ("vision_cfg", "norm_kwargs", 1e-6, "vision_cfg.norm_kwargs is 1e-06; expected Mapping, or null"),
        ("text_cfg", "mlp_ratio", "4", "text_cfg.mlp_ratio is '4'; expected a number"),
        ("text_cfg", "hf_model_name", 3, "text_cfg.hf_model_name is 3; expected str, or null"),
    ],
)
def test_a_field_of_another_kind_is_named(section, field, value, said):
    config = json.loads(json.dumps(MODELS["vit"]))
    (config[section] if section else config)[field] = value
    with pytest.raises(InputError, match=said):
        from_config(config, {})


@pytest.mark.parametrize(
    ("change", "said"),
    [({"timm_pool": "most"}, "does not build it with .*'most'"), ({"patch_dropout": 0.5}, "patch_drop_rate")],
)
def test_what_timm_does_not_build_is_said(change, said):
    config = json.loads(json.dumps(MODELS["timm-convnext-average"]))
    config["vision_cfg"] |= change
    with pytest.raises(InputError, match=rf"timm_model_name='tiny_convnext': .*{said}"):
        describe(config)


def test_an_encoder_that_reads_padding_reads_it_in_full():
    pair = pair_of("timm-mobileclip")
    with pytest.raises(InputError, match="reads padding as text"):
        pair.ours.embed("text", Padded(torch.zeros(2, 5, dtype=torch.int64)))


def test_a_tokenizer_of_the_hub_is_fetched_or_asked_for(tmp_path, monkeypatch):
    there = word_tokenizer(tmp_path, *TOKENIZERS["siglip"])
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append(allow_patterns)
        if repository == "org/none":
            raise OSError("no such repository")
        return str(there if repository == "org/words" else tmp_path / "empty")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config = native(text={"vocab_size": 64, "hf_tokenizer_name": str(there), **OTHER_TOKENIZERS["siglip"]}, **CUSTOM)
    weights = both(config, there).theirs.state_dict()
    config["text_cfg"]["hf_tokenizer_name"] = "org/words"
    made = from_config(config, weights)
    assert made.config["tokenizer"]["path"] == str(there)
    assert asked == [["tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"]]
    for name, said in (("org/none", "cannot fetch hf-hub:org/none"), ("org/empty", "hf-hub:org/empty has no tokeniz")):
        config["text_cfg"]["hf_tokenizer_name"] = name
        with pytest.raises(InputError, match=rf"{said}.*--tokenizer FOLDER"):
            from_config(config, weights)


def test_pooling_at_an_end_id_that_clips_own_tokenizer_does_not_give_is_refused():
    config = {"embed_dim": 32, "vision_cfg": {}, "text_cfg": {"pool_type": "eos"}}
    with pytest.raises(InputError, match=r"text_cfg\.eos_id=2: the tokenizer ends a text with 49407"):
        describe(config)
    config["text_cfg"]["eos_id"] = 49407
    assert describe(config).model["encoders"]["text"]["eos_id"] == 49407
