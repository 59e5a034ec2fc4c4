"""What is written for transformers computes the same there, and comes back to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mmpretrain import Padded, load
from mmpretrain.data.tokenizer import ByteTokenizer, ClipTokenizer
from mmpretrain.errors import InputError
from mmpretrain.interop import huggingface_out
from mmpretrain.interop.converted import write
from mmpretrain.interop.huggingface_in import from_folder
from mmpretrain.interop.huggingface_tokenizer_out import write_tokenizer
from tests.interop import out_models
from tests.interop.huggingface_models import KINDS, TEXTS, pictures, saved, theirs

EQUAL = [
    "a cat",
    "café Ünïcödé naïve e\u0301",
    "日本語のテキスト, привет мир",
    "emoji 😀🚲 🇩🇪 ½ ² Ⅷ",
    "it's don't we've I'll he'd 3.14",
    "tabs\tand\nnewlines  double",
    "",
    ". , ; !? ## @@ …ellipsis — dash über-groß ß ẞ İ",
    "word " * 300,
]
REPAIRED = ["curly ’quotes’", "a &amp; b", "ﬁ ligature", "ＦＵＬＬ width"]
MODELS = {"clip": out_models.clip, "siglip": out_models.siglip}


def batch(preprocess: Any) -> Padded:
    made = [preprocess(image) for image in pictures()]
    return preprocess.collate(made) if hasattr(preprocess, "collate") else Padded(torch.stack(made))


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_computes_the_same(kind: str, tmp_path: Path) -> None:
    folder = out_models.saved(tmp_path / "ours", MODELS[kind]())
    report = huggingface_out.export(folder, tmp_path / "out")
    assert report.largest <= 1e-5 and report.errors["token ids"] == 0
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["versions"]["transformers"]
    model, preprocess, tokenizer = load(folder)
    found = theirs(tmp_path / "out", pictures(), TEXTS)
    texts = tokenizer(TEXTS)
    with torch.no_grad():
        assert (found.image - model.embed("image", batch(preprocess))).abs().max() <= 1e-5
        assert (found.text - model.embed("text", texts)).abs().max() <= 1e-5
    real = texts.mask if kind == "clip" else torch.ones_like(texts.mask)
    length = min(found.ids.shape[1], texts.values.shape[1])
    assert torch.equal(found.ids[:, :length][real[:, :length]], texts.values[:, :length][real[:, :length]])


@pytest.mark.parametrize("kind", MODELS)
def test_the_way_back_is_exact(kind: str, tmp_path: Path) -> None:
    folder = out_models.saved(tmp_path / "ours", MODELS[kind]())
    huggingface_out.export(folder, tmp_path / "out")
    again = load(write(from_folder(tmp_path / "out"), tmp_path / "again"))
    before = load(folder)
    assert again.model.state_dict().keys() == before.model.state_dict().keys()
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    texts, other = before.tokenizer(TEXTS), again.tokenizer(TEXTS)
    assert torch.equal(texts.values[texts.mask], other.values[other.mask])
    images = batch(before.preprocess)
    assert torch.equal(images.values, batch(again.preprocess).values)
    with torch.no_grad():
        assert torch.equal(before.model.embed("image", images), again.model.embed("image", images))


@pytest.mark.parametrize("kind", KINDS)
def test_what_came_from_transformers_goes_back_there(kind: str, tmp_path: Path) -> None:
    theirs_before = saved(tmp_path / "theirs", kind)
    folder = write(from_folder(theirs_before), tmp_path / "ours")
    report = huggingface_out.export(folder, tmp_path / "out")
    assert report.largest <= 1e-5
    before, after = (theirs(path, pictures(), TEXTS) for path in (theirs_before, tmp_path / "out"))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    again = from_folder(tmp_path / "out").weights
    assert all(torch.equal(again[name], tensor) for name, tensor in from_folder(theirs_before).weights.items())


def test_a_model_of_bytes_keeps_its_ids(tmp_path: Path) -> None:
    config = out_models.clip()
    config["model"]["encoders"]["text"] |= {"vocab_size": 259, "eos_id": 2}
    config["tokenizer"] = {"_target_": "mmpretrain.data.tokenizer.ByteTokenizer", "context_length": 16}
    folder = out_models.saved(tmp_path / "ours", config)
    with pytest.raises(InputError, match="end id 2, which it takes for the largest id"):
        huggingface_out.export(folder, tmp_path / "out")
    config = out_models.siglip()
    config["model"]["encoders"]["text"] |= {"vocab_size": 259, "eos_id": 2}
    tokenizer = {"_target_": "mmpretrain.data.tokenizer.ByteTokenizer", "context_length": 16, "pad": "context_length"}
    config["tokenizer"] = tokenizer
    folder = out_models.saved(tmp_path / "bytes", config)
    assert huggingface_out.export(folder, tmp_path / "out").errors["token ids"] == 0
    again = load(write(from_folder(tmp_path / "out"), tmp_path / "again")).tokenizer
    texts = ["größer\nals 3", "a cat"]
    assert torch.equal(again(texts).values, ByteTokenizer(16, pad="context_length")(texts).values)


def test_every_way_to_load_clips_tokenizer_gives_its_ids(tmp_path: Path) -> None:
    ours = ClipTokenizer(77)
    write_tokenizer(ours, tmp_path, reads_padding=False)
    files = {"vocab": str(tmp_path / "vocab.json"), "merges": str(tmp_path / "merges.txt")}
    loaded = [
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        transformers.CLIPTokenizer.from_pretrained(tmp_path),
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path),
        transformers.CLIPTokenizer(**files),
    ]
    for text in EQUAL:
        padded = ours([text])
        expected = padded.values[padded.mask].tolist()
        assert all(t(text, truncation=True, max_length=77).input_ids == expected for t in loaded), text
    for text in REPAIRED:  # as between OpenAI's tokenizer and transformers'
        padded = ours([text])
        assert loaded[0](text).input_ids != padded.values[padded.mask].tolist(), text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (out_models.small_clip, "no image encoder without a norm before its blocks; no bias in the patch embedding"),
        (lambda: out_models.clip(global_pool="avg"), "no avg pooling of the image"),
        (lambda: out_models.clip(init_values=0.1), "no layer scale"),
        (lambda: out_models.clip(qk_norm=True), "norms of query and key"),
        (lambda: out_models.clip(reg_tokens=2), "register tokens"),
        (lambda: out_models.siglip(global_pool="avg", class_token=True), "no avg pooling of the image; no class token"),
        (out_models.coca, "a fusion, heads"),
        (out_models.naflex, "token ids"),  # transformers takes Gemma's tokenizer for every Siglip2Model
    ],
)
def test_what_transformers_cannot_hold_is_named_and_nothing_is_left(config: Any, message: str, tmp_path: Path) -> None:
    folder = out_models.saved(tmp_path / "ours", config())
    with pytest.raises(InputError, match=message):
        huggingface_out.export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_paddings_that_are_words_are_refused_where_they_are_read(tmp_path: Path) -> None:
    config = out_models.siglip()
    config["tokenizer"]["pad_id"] = 0
    folder = out_models.saved(tmp_path / "ours", config)
    with pytest.raises(InputError, match="cannot pad with the id 0"):
        huggingface_out.export(folder, tmp_path / "out")


def test_beyond_the_tolerance_nothing_is_kept(tmp_path: Path) -> None:
    folder = out_models.saved(tmp_path / "ours", out_models.clip())
    with pytest.raises(InputError, match="differ by more than 1e-12"):
        huggingface_out.export(folder, tmp_path / "out", tolerance=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("read", ["upright", "rgb"])
def test_files_that_transformers_reads_otherwise_are_noted(read: str, tmp_path: Path) -> None:
    config = out_models.clip()
    config["preprocess"]["read"] = read
    report = huggingface_out.export(out_models.saved(tmp_path / "ours", config), tmp_path / "out")
    if read == "rgb":
        assert not report.notes and report.errors["pixels of files transparent"] <= 1e-5
        return
    assert (report.notes or {})["pixels of files turned (EXIF)"] > 0.1
    assert "turned (EXIF)" in report.said


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs a package.*mmpretrain-contrastive\[huggingface\]"):
        huggingface_out.export(tmp_path, tmp_path / "out")
