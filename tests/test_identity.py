"""The identity card: every field that decides the numbers is caught when it changes, by its name."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import mmpretrain
from mmpretrain import InputError, identity, load, save
from mmpretrain.cli import main
from mmpretrain.config import instantiate
from mmpretrain.identity.fields import options
from mmpretrain.identity.golden import SIDES, _apart, picture

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "global_pool": "token"}
TEXT = {"vocab_size": 12, "eos_id": 1, "context_length": 16, "width": 32, "depth": 1, "num_heads": 2}
CONFIG = {
    "model": {
        "_target_": "mmpretrain.MultimodalModel",
        "embed_dim": 16,
        "encoders": {
            "image": {"_target_": "mmpretrain.ImageEncoder", "name": "vit_base_patch32_clip_224", "model_args": VIT},
            "text": {"_target_": "mmpretrain.TextEncoder", **TEXT},
        },
    },
    "preprocess": {"_target_": "mmpretrain.data.preprocess.Preprocess", "image_size": 16},
    "tokenizer": {
        "_target_": "mmpretrain.data.tokenizer.HuggingFaceTokenizer",
        "context_length": 16,
        "eos_token": "[END]",
        "pad_token": "[PAD]",
    },
}
WORDS = ["[PAD]", "[END]", "a", "photo", "of", "red", "bicycle", "words", "that", "are", "seven", "[UNK]"]


def vocabulary(path: Path, words: list[str] = WORDS) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model as it was saved, and where verdicts are remembered."""
    place = tmp_path_factory.mktemp("identity")
    config = copy.deepcopy(CONFIG)
    config["tokenizer"]["path"] = str(vocabulary(place / "words.json"))
    torch.manual_seed(0)
    return save(place / "model", instantiate(config["model"]), config, "made for this test")


@pytest.fixture
def folder(original, tmp_path, monkeypatch):
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_a_card_says_what_decides_the_numbers(folder):
    card = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
    assert card["source"] == "made for this test" and card["format"] == identity.FORMAT
    expected = {
        "precision": "float32",
        "embed_dim": 16,
        "logit_bias": None,
        "preprocess.image_size": 16,
        "preprocess.resize": "crop",
        "preprocess.exact": True,
        "preprocess.interpolation": "bicubic",
        "preprocess.read": "upright",
        "preprocess.class": "Preprocess",
        "model.encoders.image.mean": [0.48145466, 0.4578275, 0.40821073],
        "model.encoders.image.std": [0.26862954, 0.26130258, 0.27577711],
        "image.pooling": ["token"],
        "image.activations": ["gelu"],
        "image.norm_eps": [1e-5],
        "image.input_size": [16, 16],
        "model.encoders.text.pooling": "eos",
        "model.encoders.text.causal": True,
        "text.activations": ["gelu"],
        "text.norm_eps": [1e-5],
        "tokenizer.class": "HuggingFaceTokenizer",
        "tokenizer.vocab_size": 12,
        "tokenizer.context_length": 16,
        "tokenizer.eos_id": 1,
        "tokenizer.pad_id": 0,
        "tokenizer.start_id": None,
    }
    assert expected == {name: card["fields"][name] for name in expected}
    assert card["fields"]["logit_scale"] == pytest.approx(1 / 0.07)
    assert card["golden"]["missing"] == {}
    for name, file in (("weights", "model.safetensors"), ("vectors", "golden.safetensors")):
        assert card[name] == identity.sha256(folder / file)
    assert card["fields"]["tokenizer.vocabulary"] == identity.sha256(folder / "tokenizer.json")
    assert card["golden"]["ids"][0] == [2, 3, 4, 2, 5, 6, 1]  # a photo of a red bicycle [END]
    vectors = load_file(folder / "golden.safetensors")
    assert {name: list(x.shape) for name, x in vectors.items()} == {
        "image.pixels.0": [3, 16, 16],
        "image.pixels.1": [3, 16, 16],
        "image.embeddings": [2, 16],
        "text.embeddings": [4, 16],
    }
    torch.testing.assert_close(vectors["image.embeddings"].norm(dim=1), torch.ones(2))
    assert (folder / "golden.safetensors").stat().st_size < 4000


def test_what_is_saved_loads_again_and_again(folder):
    model = load(folder).model
    again = save(
        folder.parent / "again",
        model,
        OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        | {"tokenizer": {**CONFIG["tokenizer"], "path": str(folder / "tokenizer.json")}},
    )
    first, second = (json.loads((f / "identity.json").read_text(encoding="utf-8")) for f in (folder, again))
    assert first["fields"] == second["fields"] and first["vectors"] == second["vectors"]
    assert first["weights"] == second["weights"] and second["source"] == "mmpretrain.save"


MODEL, IMAGE, TEXTS = "model", "model.encoders.image", "model.encoders.text"


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("preprocess.image_size", 24, "preprocess.image_size"),
        ("preprocess.resize", "squash", "preprocess.resize"),
        ("preprocess.interpolation", "bilinear", "preprocess.interpolation"),
        ("preprocess.fill", 128, "preprocess.fill"),
        ("preprocess.exact", False, "preprocess.exact"),
        ("preprocess.read", "stored", "preprocess.read"),
        (f"{IMAGE}.mean", [0.5, 0.5, 0.5], f"{IMAGE}.mean"),
        (f"{IMAGE}.std", [0.5, 0.5, 0.5], f"{IMAGE}.std"),
        (f"{IMAGE}.std", [0.26862954, 0.26130258, 0.2757], f"{IMAGE}.std"),
        (f"{IMAGE}.model_args.act_layer", "quick_gelu", "image.activations"),
        (f"{IMAGE}.model_args.norm_layer", "layernorm", "image.norm_eps"),
        (f"{IMAGE}.model_args.num_heads", 4, f"{IMAGE}.model_args.num_heads"),
        (f"{TEXTS}.pooling", "mean", f"{TEXTS}.pooling"),
        (f"{TEXTS}.causal", False, f"{TEXTS}.causal"),
        (f"{TEXTS}.activation", "quick_gelu", f"{TEXTS}.activation"),
        (f"{TEXTS}.norm_eps", 1e-6, f"{TEXTS}.norm_eps"),
        (f"{TEXTS}.eos_id", 2, f"{TEXTS}.eos_id"),
        (f"{TEXTS}.num_heads", 4, f"{TEXTS}.num_heads"),
        ("tokenizer.context_length", 12, "tokenizer.context_length"),
        ("tokenizer.eos_token", "a", "tokenizer.eos_token"),
        ("tokenizer.pad_token", "of", "tokenizer.pad_token"),
        ("tokenizer.start_token", "a", "tokenizer.start_id"),
        ("tokenizer.pad", "context_length", "tokenizer.pad"),
    ],
)
def test_a_changed_option_is_caught_by_name(folder, key, value, field):
    load(folder)  # a good verdict is remembered, and must not hide what changes afterwards
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(config, key, value, force_add=True)
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(InputError, match=f"not what its identity card says: .*{field} is .*the card says"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"), [(f"{IMAGE}.model_args.global_pool", "avg"), (f"{TEXTS}.width", 64), (f"{TEXTS}.vocab_size", 20)]
)
def test_an_option_that_the_weights_do_not_fit_is_named_too(folder, key, value):
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(InputError, match=f"does not fit .*the config was changed: .*{key} is {value!r}"):
        load(folder)


def test_another_class_of_tokenizer_is_caught(folder):
    config = OmegaConf.load(folder / "config.yaml")
    config.tokenizer = {"_target_": "mmpretrain.data.tokenizer.ByteTokenizer", "context_length": 16}
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(InputError, match=r"tokenizer.class is 'ByteTokenizer', the card says 'HuggingFaceTokenizer'"):
        load(folder)


def test_another_vocabulary_is_caught(folder):
    load(folder)
    vocabulary(folder / "tokenizer.json", [*WORDS[:5], "bicycle", "red", *WORDS[7:]])
    with pytest.raises(InputError, match=r"tokenizer.vocabulary is"):
        load(folder)


def _change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_changed_weights_are_caught_however_small_the_change(folder):
    load(folder)
    _change_weights(folder, lambda tensors: tensors["encoders.text.norm.weight"][0].mul_(1.0001))
    with pytest.raises(InputError, match=r"weights: model.safetensors is not the file"):
        load(folder)


def test_another_logit_scale_is_caught_by_name(folder):
    _change_weights(folder, lambda tensors: tensors["logit_scale"].add_(0.1))
    with pytest.raises(InputError, match="logit_scale is"):
        load(folder)


def test_another_precision_is_caught_by_name(folder):
    _change_weights(folder, lambda tensors: tensors.update({name: x.bfloat16() for name, x in tensors.items()}))
    with pytest.raises(InputError, match="precision is 'bfloat16', the card says 'float32'"):
        load(folder)


def _change_card(folder: Path, change) -> None:
    card = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
    change(card)
    (folder / "identity.json").write_text(json.dumps(card), encoding="utf-8")


def _change_vectors(folder: Path, name: str, change) -> None:
    vectors = load_file(folder / "golden.safetensors")
    vectors[name] = change(vectors[name])
    save_file(vectors, folder / "golden.safetensors")
    _change_card(folder, lambda card: card.update(vectors=identity.sha256(folder / "golden.safetensors")))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image.pixels.1", lambda x: x.flip(-1).contiguous(), "golden pixels: the preprocessing is up to"),
        ("image.pixels.0", lambda x: x[:, :8].contiguous(), "golden pixels: they are torch.uint8"),
        ("image.embeddings", lambda x: x + 1e-3, "golden vectors: image embeddings are up to 1.0e-03 off"),
        ("text.embeddings", lambda x: x * torch.nan, "golden vectors: text embeddings are up to inf off"),
        ("text.embeddings", lambda x: x[:, :8].contiguous(), "golden vectors: text embeddings are .*4, 16"),
    ],
)
def test_other_golden_outputs_are_caught(folder, name, change, message):
    _change_vectors(folder, name, change)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_other_golden_ids_are_caught(folder):
    _change_card(folder, lambda card: card["golden"]["ids"][0].__setitem__(1, 9))
    with pytest.raises(InputError, match=r"golden ids: the tokenizer gives .* for 'a photo of a red bicycle'"):
        load(folder)


def test_rounding_of_another_machine_is_let_through(folder, monkeypatch):
    from mmpretrain.data.preprocess import Preprocess

    _change_vectors(folder, "image.embeddings", lambda x: x + 2e-5)
    load(folder)
    call = Preprocess.__call__
    monkeypatch.setattr(Preprocess, "__call__", lambda *given: call(*given) ^ 1)  # another Pillow: a level up or down
    load(folder)
    (folder / "model.safetensors").touch()
    load(folder)
    monkeypatch.setattr(Preprocess, "__call__", lambda *given: call(*given) ^ 4)
    load(folder)  # the verdict is remembered, as no file has changed
    (folder / "model.safetensors").touch()
    with pytest.raises(InputError, match="golden pixels: the preprocessing is up to 4 levels off"):
        load(folder)


def test_code_that_computes_something_else_is_caught_and_versions_are_named(folder, monkeypatch):
    """What no field shows: the same options, but a library whose numbers changed."""
    from mmpretrain.encoders import text

    _change_card(folder, lambda card: card["versions"].update(torch="1.0"))
    forward = text.TextEncoder.forward
    monkeypatch.setattr(
        text.TextEncoder, "forward", lambda *given: forward(*given)._replace(pooled=forward(*given).tokens[:, 0])
    )
    with pytest.raises(InputError, match=r"golden vectors: text embeddings .*written with torch 1.0 there, .* here"):
        load(folder)


def test_a_changed_default_is_caught_by_name(folder, monkeypatch):
    from mmpretrain.data.preprocess import Preprocess

    monkeypatch.setattr(Preprocess.__init__, "__defaults__", ("squash", True, "bicubic", 0, "upright"))
    with pytest.raises(InputError, match=r"preprocess.resize is 'squash', the card says 'crop'"):
        load(folder)


def test_options_of_training_may_change(folder):
    config = OmegaConf.load(folder / "config.yaml")
    config.model.encoders.text.gradient_checkpointing = True
    config.model.freeze = ["image"]
    config.tokenizer.pad_multiple = 1
    OmegaConf.save(config, folder / "config.yaml")
    load(folder)


def test_the_verdict_is_remembered_until_a_file_changes(folder, monkeypatch):
    calls = []
    real = identity.disagreement
    monkeypatch.setattr(identity, "disagreement", lambda *given: calls.append(1) or real(*given))
    for _ in range(3):
        load(folder)
    assert len(calls) == 1
    (folder / "model.safetensors").touch()
    load(folder)
    assert len(calls) == 2
    assert main(["card", str(folder), "--check"]) == 0  # asked for, it is compared again
    assert len(calls) == 3
    monkeypatch.setattr(identity, "versions", lambda: {"torch": "another"})
    load(folder)
    assert len(calls) == 4


def test_old_verdicts_are_forgotten(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "VERDICTS", 2)
    for _ in range(4):
        (folder / "model.safetensors").touch()
        load(folder)
    assert len(list((tmp_path / "cache" / "verified").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_hindrance(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "file"))
    load(folder)
    load(folder)


def test_a_folder_without_a_card_loads_and_can_be_given_one(folder, capsys):
    for name in ("identity.json", "golden.safetensors"):
        (folder / name).unlink()
    with pytest.warns(UserWarning, match="has no identity card, so nothing was verified; `mmpretrain card"):
        load(folder)
    assert main(["card", str(folder), "--check"]) == 1
    assert main(["card", str(folder), "--source", "found in a drawer"]) == 0
    load(folder)
    assert json.loads((folder / "identity.json").read_text(encoding="utf-8"))["source"] == "found in a drawer"
    config = OmegaConf.load(folder / "config.yaml")
    config.preprocess.resize = "squash"
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(InputError, match="writes a new card"):
        load(folder)
    load(folder, verify=False)
    assert main(["card", str(folder)]) == 0  # meant: the source is kept
    assert load(folder).preprocess.resize == "squash"
    assert json.loads((folder / "identity.json").read_text(encoding="utf-8"))["source"] == "found in a drawer"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no identity card"),
        ("[]", "is no identity card"),
        ("{" * 5000, "is no identity card"),
        ('{"format": 2}', "has the format 2, this version of mmpretrain reads 1"),
        ('{"format": 1}', "is no identity card .KeyError"),
    ],
)
def test_a_damaged_card_is_refused(folder, content, message):
    (folder / "identity.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load(folder)


def test_vectors_that_are_missing_damaged_or_of_another_card_are_refused(folder):
    data = (folder / "golden.safetensors").read_bytes()
    (folder / "golden.safetensors").write_bytes(data[:-1] + b"\0\0")
    with pytest.raises(InputError, match=r"is not the file that identity.json was written with"):
        load(folder)
    (folder / "golden.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load(folder)
    (folder / "golden.safetensors").write_bytes(b"no tensors")
    _change_card(folder, lambda card: card.update(vectors=identity.sha256(folder / "golden.safetensors")))
    with pytest.raises(InputError, match="is no identity card"):
        load(folder)


def test_a_config_that_builds_another_model_than_the_one_saved_is_refused(tmp_path):
    config = {**CONFIG, "tokenizer": {**CONFIG["tokenizer"], "path": str(vocabulary(tmp_path / "words.json"))}}
    other = copy.deepcopy(CONFIG["model"])
    other["encoders"]["text"]["activation"] = "quick_gelu"
    with pytest.raises(InputError, match=r"the config builds another model than the one to save .*text embeddings"):
        save(tmp_path / "model", instantiate(other), config)
    assert not (tmp_path / "model").exists()


def test_saving_leaves_the_model_and_the_randomness_as_they_were(tmp_path):
    config = {**CONFIG, "tokenizer": {**CONFIG["tokenizer"], "path": str(vocabulary(tmp_path / "words.json"))}}
    model = instantiate(CONFIG["model"]).train()
    model.encoders["image"].eval()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    save(tmp_path / "model", model, config)
    assert torch.equal(torch.rand(2), expected)
    assert model.training and not model.encoders["image"].training and model.encoders["text"].training


def test_a_model_in_half_precision_is_verified_as_it_loads(tmp_path):
    config = {**CONFIG, "tokenizer": {**CONFIG["tokenizer"], "path": str(vocabulary(tmp_path / "words.json"))}}
    folder = save(tmp_path / "model", instantiate(CONFIG["model"]).bfloat16(), config)
    assert json.loads((folder / "identity.json").read_text(encoding="utf-8"))["fields"]["precision"] == "bfloat16"
    load(folder)


class Waves(torch.nn.Module):
    """An encoder of another modality, of a package that is not ours."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 8)

    def forward(self, values, mask=None):
        tokens = self.layer(values)
        return mmpretrain.Encoded(tokens.mean(1), tokens, None)


def test_an_encoder_that_nothing_golden_fits_is_said_to_be_unverified(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    config = {
        **CONFIG,
        "model": {
            "_target_": "mmpretrain.MultimodalModel",
            "embed_dim": 16,
            "encoders": {
                "audio": {"_target_": "tests.test_identity.Waves"},
                "text": CONFIG["model"]["encoders"]["text"],
            },
        },
        "tokenizer": {**CONFIG["tokenizer"], "path": str(vocabulary(tmp_path / "words.json"))},
    }
    model = instantiate(config["model"], allow=["tests"])
    folder = save(tmp_path / "model", model, config)  # the model shows which package it is of
    card = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
    assert card["golden"]["missing"] == {"audio": "no golden input of this modality"}
    assert set(load_file(folder / "golden.safetensors")) == {"text.embeddings"}
    with pytest.raises(InputError, match="not allowed"):
        load(folder)
    load(folder, allow=["tests"])


def test_golden_pictures_are_drawn_by_integers_and_stay_the_same():
    import hashlib

    drawn = [picture(*sides) for sides in SIDES]
    assert [image.size for image in drawn] == [(331, 257), (61, 97)]
    assert hashlib.sha256(b"".join(image.tobytes() for image in drawn)).hexdigest()[:16] == GOLDEN


GOLDEN = "7a2e01a2398e77c9"


def test_options_have_their_defaults_and_lists_of_parts_are_walked():
    found = dict(
        options({"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.LayerNorm", "eps": 1e-3}]}, "x")
    )
    assert found["x.class"] == "Sequential" and found["x._args_.0.eps"] == 1e-3
    assert found["x._args_.0.elementwise_affine"] is True


def test_names_of_published_models_are_resolved_and_folders_of_that_name_are_not(folder, monkeypatch):
    from mmpretrain.interop import remote

    asked = []
    monkeypatch.setattr(remote, "resolve", lambda name: asked.append(name) or folder)
    for name in ("open_clip:ViT-B-32/openai", "openai:ViT-B/32", "hf-hub:org/name"):
        load(name)
    assert asked == ["open_clip:ViT-B-32/openai", "openai:ViT-B/32", "hf-hub:org/name"]
    monkeypatch.chdir(folder.parent)
    folder.rename(folder.parent / "my:model")
    load("my:model")
    assert len(asked) == 3


def test_saving_and_loading_say_nothing(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


def test_nan_is_not_taken_for_nan():
    broken = torch.full((2, 3), torch.nan)
    assert "up to inf off" in str(_apart("text", broken, broken))
