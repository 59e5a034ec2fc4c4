"""ONNX Runtime gives our embeddings, at any batch size and text length, for every family that is shipped."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import mmpretrain
from mmpretrain import InputError, Padded
from mmpretrain.config import instantiate
from mmpretrain.interop import onnx_out
from mmpretrain.interop.programs import PictureEmbedder, cases
from tests.interop import tiny


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    tiny.saved(folder / "model", "clip_tiny")
    onnx_out.export(folder / "model", folder / "out")
    return folder


@pytest.mark.parametrize("family", tiny.PARAMETERS)
def test_every_family_gives_the_same_embeddings(family, tmp_path, exported):
    if family == "clip_tiny":
        folder = exported
    else:
        folder = tmp_path
        report = onnx_out.export(tiny.saved(folder / "model", family), folder / "out")
        assert report.largest <= 1e-5 and {name.split()[0] for name in report.errors} == {"image", "text"}
    model, _, tokenizer = mmpretrain.load(folder / "model")
    generator = torch.Generator().manual_seed(3)
    image, text = (session(folder / "out" / f"{name}.onnx") for name in ("image", "text"))
    for size, words in ((1, "a"), (4, "some words"), (7, "longer than the context of this small model")):
        pixels = torch.randint(0, 256, (size, 3, tiny.SIDE, tiny.SIDE), generator=generator, dtype=torch.uint8)
        padded = tokenizer([f"{words} {'x' * i}" for i in range(size)])
        with torch.no_grad():
            want = model.embed("image", pixels), model.embed("text", padded)
        feed = {"text": padded.values.numpy(), "mask": padded.mask.numpy()}
        got = image.run(["embedding"], {"image": pixels.numpy()})[0], text.run(["embedding"], feed)[0]
        for ours, theirs in zip(want, got, strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-5)


def test_padding_changes_no_embedding(exported):
    model, _, tokenizer = mmpretrain.load(exported / "model")
    ids, mask, _ = tokenizer(["short", "a longer one"])
    run = session(exported / "out" / "text.onnx").run
    wide = [np.pad(part.numpy(), ((0, 0), (0, tiny.LENGTH - part.shape[1]))) for part in (ids, mask)]
    got = [run(None, {"text": a, "mask": b})[0] for a, b in ((ids.numpy(), mask.numpy()), wide)]
    np.testing.assert_allclose(got[0], got[1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(got[0], model.embed("text", Padded(ids, mask)).detach(), rtol=0, atol=1e-5)


def test_names_types_and_opset_are_those_documented(exported):
    found = {}
    for name in ("image", "text"):
        model = onnx.load(exported / "out" / f"{name}.onnx")
        onnx.checker.check_model(model)
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [onnx_out.OPSET]
        for value in [*model.graph.input, *model.graph.output]:
            kind = value.type.tensor_type
            found[f"{name} {value.name}"] = (
                onnx.TensorProto.DataType.Name(kind.elem_type),
                [axis.dim_param or axis.dim_value for axis in kind.shape.dim],
            )
    assert found == {
        "image image": ("UINT8", ["batch", 3, tiny.SIDE, tiny.SIDE]),
        "image embedding": ("FLOAT", ["batch", 192]),
        "text text": ("INT64", ["batch", "length"]),
        "text mask": ("BOOL", ["batch", "length"]),
        "text embedding": ("FLOAT", ["batch", 192]),
    }


def test_the_folder_holds_all_that_is_needed(exported):
    """From a picture and texts to probabilities with the exported files alone."""
    out = exported / "out"
    assert {p.name for p in out.iterdir()} == {"image.onnx", "text.onnx", "inputs.json", "parity.json"}
    described = json.loads((out / "inputs.json").read_text())
    assert described["encoders"]["text"]["inputs"]["mask"] == {"dtype": "bool", "shape": ["batch", "length"]}
    preprocess, tokenizer = (instantiate(described[part]) for part in ("preprocess", "tokenizer"))
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    image = session(out / described["encoders"]["image"]["file"]).run(
        None, {"image": preprocess(picture)[None].numpy()}
    )
    ids, mask, _ = tokenizer(["noise", "a cat"])
    text = session(out / described["encoders"]["text"]["file"]).run(None, {"text": ids.numpy(), "mask": mask.numpy()})
    model = mmpretrain.load(exported / "model").model
    logits = described["logit_scale"] * image[0] @ text[0].T
    with torch.no_grad():
        outputs = model({"image": Padded(preprocess(picture)[None]), "text": Padded(ids, mask)})
        want = outputs.logit_scale * outputs.embeddings["image"] @ outputs.embeddings["text"].T
    np.testing.assert_allclose(logits, want, atol=1e-3)
    assert described["logit_bias"] is None


def test_the_report_names_inputs_opset_and_versions(exported):
    report = json.loads((exported / "out" / "parity.json").read_text())
    assert report["inputs"]["opset"] == 18 and report["inputs"]["seed"] == 0
    assert [shape[0] for shape in report["inputs"]["shapes"]["image"]] == [1, 2, 5]
    lengths = [shape[1] for shape in report["inputs"]["shapes"]["text"]]
    assert len(set(lengths)) == 3 and lengths[-1] == tiny.LENGTH
    assert {"onnx", "onnxruntime", "onnxscript", "torch"} <= set(report["versions"])
    assert len(report["errors"]) == 6 and max(report["errors"].values()) == report["largest"]


@pytest.fixture
def instead(exported, monkeypatch):
    """Lets an export take the files of `exported` instead of writing its own."""
    monkeypatch.setattr(onnx_out, "_write", lambda case, path: shutil.copyfile(exported / "out" / path.name, path))


@pytest.mark.usefixtures("instead")
def test_the_tokenizer_of_a_file_comes_along(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<end>": 2, **{word: i + 3 for i, word in enumerate(["a", "cat", "red"])}}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    parts = tiny.config("clip_tiny")
    parts["tokenizer"] = {
        "_target_": "mmpretrain.data.tokenizer.HuggingFaceTokenizer",
        "path": str(tmp_path / "words.json"),
        "context_length": tiny.LENGTH,
        "eos_token": "<end>",
        "pad_token": "<pad>",
    }
    torch.manual_seed(0)
    mmpretrain.save(tmp_path / "model", instantiate(parts["model"]), parts)
    onnx_out.export(tmp_path / "model", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "inputs.json").read_text())["tokenizer"]["path"] == "tokenizer.json"
    saved = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert saved.encode("a red cat").ids == tokenizer.encode("a red cat").ids


@pytest.mark.usefixtures("instead")
def test_files_that_compute_something_else_are_refused_and_nothing_is_kept(tmp_path):
    folder = tiny.saved(tmp_path / "model", "clip_tiny", seed=1)
    with pytest.raises(
        InputError, match=r"onnx: 6 of 6 outputs differ by more than 1e-05: image 1x3x32x32 by .*e-01; "
    ):
        onnx_out.export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("instead")
def test_what_onnx_runtime_cannot_run_is_said(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_out, "_write", lambda case, path: path.write_bytes(b"no model"))
    with pytest.raises(InputError, match="image encoder cannot be exported by ONNX Runtime"):
        onnx_out.export(exported / "model", tmp_path / "out")
    assert not list(tmp_path.iterdir())


class _Unknown(nn.Module):
    width = 8

    def forward(self, values, mask=None):
        pixels = values.float().flatten(1)[:, :8]
        return mmpretrain.Encoded(torch.special.bessel_j0(pixels), pixels[:, None], None)


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    pretrained = mmpretrain.load(tiny.saved(tmp_path / "model", "clip_tiny"))
    model = mmpretrain.MultimodalModel(8, {"image": _Unknown()})
    (case,) = cases(pretrained._replace(model=model))
    assert isinstance(case.module, PictureEmbedder)
    with pytest.raises(
        InputError, match=r"image encoder cannot be exported by ONNX: it has no form of prims\.bessel_j0\."
    ):
        onnx_out._write(case, tmp_path / "image.onnx")


def test_other_modalities_and_missing_packages_are_refused(tmp_path, monkeypatch):
    pretrained = mmpretrain.load(tiny.saved(tmp_path / "model", "clip_tiny"))
    model = mmpretrain.MultimodalModel(8, {"audio": _Unknown()})
    with pytest.raises(InputError, match="encoders for audio"):
        cases(pretrained._replace(model=model))
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'mmpretrain-contrastive\[onnx\]'"):
        onnx_out.export(tmp_path / "model", tmp_path / "out")
