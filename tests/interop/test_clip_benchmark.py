"""CLIP_benchmark's own command line evaluates our models, and its scores are ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mmpretrain.config import instantiate
from mmpretrain.errors import InputError
from mmpretrain.evaluation import BenchmarkData, Retrieval, ZeroShotClassification
from mmpretrain.interop import clip_benchmark as client
from mmpretrain.pretrained import load, save
from tests.evaluation.digits import NAMES, png, scans, write_digits, write_shards
from tests.evaluation.suite_example import save_model, save_run

pytest.importorskip("clip_benchmark")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the peer and what it imports
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("sets") / "digits")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with two captions each, all of them different: the two suites count ties differently."""
    folder = tmp_path_factory.mktemp("sets") / "captions"
    pictures, labels = scans()
    samples = [
        {
            "png": png(pictures[i]),
            "txt": f"scan {i} of a {NAMES[labels[i]]}\nnumber {labels[i]} by {i * 7919}\n".encode(),
        }
        for i in range(120)
    ]
    write_shards(folder / "test", samples)
    (folder / "dataset_type.txt").write_text("retrieval")
    return folder


def theirs(out: Path, *arguments: str) -> dict[str, float]:
    """Run their command line in this process, in float32 and without workers."""
    assert client.main(["eval", *arguments, "--no_amp", "--num_workers", "0", "--quiet", "--output", str(out)]) == 0
    found: dict[str, float] = json.loads(out.read_text())["metrics"]
    return found


def test_zero_shot_scores_are_ours(model: Path, digits: Path, tmp_path: Path) -> None:
    data = ["--dataset", "wds/digits", "--dataset_root", str(digits), "--task", "zeroshot_classification"]
    got = theirs(tmp_path / "r.json", *data, "--pretrained", str(model), "--batch_size", "37")
    own = ZeroShotClassification(partial(BenchmarkData, digits))(load(model))
    assert 0 < own["top1"] < own["top5"] < 1
    for name, ours in (("acc1", "top1"), ("acc5", "top5"), ("mean_per_class_recall", "mean_class_recall")):
        assert got[name] == pytest.approx(own[ours], abs=1e-6)


def test_retrieval_scores_are_ours(model: Path, captioned: Path, tmp_path: Path) -> None:
    data = ["--dataset", "wds/captions", "--dataset_root", str(captioned), "--task", "zeroshot_retrieval"]
    got = theirs(tmp_path / "r.json", *data, "--pretrained", str(model), "--recall_k", "1", "5", "10")
    own = Retrieval(partial(BenchmarkData, captioned))(load(model))
    assert 0 < own["image_to_text/recall@10"] < 1
    for k in (1, 5, 10):
        assert got[f"image_retrieval_recall@{k}"] == pytest.approx(own[f"text_to_image/recall@{k}"], abs=1e-6)
        assert got[f"text_retrieval_recall@{k}"] == pytest.approx(own[f"image_to_text/recall@{k}"], abs=1e-6)


def test_checkpoints_of_a_run_can_be_named(digits: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", (10, 20))
    data = ["--dataset", "wds/digits", "--dataset_root", str(digits), "--task", "zeroshot_classification"]
    step = run / "checkpoints" / "step_00000010"
    got = theirs(tmp_path / "r.json", *data, "--pretrained_model", f"mmpretrain,{step}")
    own = ZeroShotClassification(partial(BenchmarkData, digits))(client.load("mmpretrain", str(step)))
    assert got["acc1"] == pytest.approx(own["top1"], abs=1e-6)
    with pytest.raises(InputError, match="2 models"):
        client.load("mmpretrain", str(run / "checkpoints"))


def test_features_for_a_linear_probe_are_ours(model: Path, digits: Path) -> None:
    """Its probe itself needs a GPU and stops short of the optimum; what it is fitted to is what ours is fitted to."""
    from clip_benchmark.metrics.linear_probe import Featurizer

    from mmpretrain.evaluation import embed_images

    pretrained = client.load("mmpretrain", str(model))
    data = BenchmarkData(digits, transform=pretrained.preprocess)
    with torch.no_grad():
        got = Featurizer(pretrained.model)(torch.stack([data[i][0] for i in range(50)]))
    own = embed_images(pretrained.model, data).embeddings[:50]
    torch.testing.assert_close(got, own, rtol=0, atol=1e-6)


def test_registering_twice_is_registering_once(model: Path) -> None:
    from clip_benchmark import models

    client.register()
    client.register()
    assert models.MODEL_TYPES.count("mmpretrain") == 1
    found = models.load_clip(
        model_type="mmpretrain", model_name="x", pretrained=str(model), cache_dir=None, device="cpu"
    )
    assert found[0].encode_text(found[2](["a scan"]).to("cpu")).shape == (1, 16)


def test_its_accuracy_is_the_share_of_hits() -> None:
    """Ours takes the place of theirs where NumPy no longer runs theirs; both are a count by hand."""
    client.register()
    from clip_benchmark.metrics import linear_probe, zeroshot_classification

    scores, labels = torch.rand(40, 7, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 7
    order = scores.argsort(dim=1, descending=True).tolist()
    by_hand = [sum(labels[i].item() in order[i][:k] for i in range(40)) / 40 for k in (1, 5)]
    for found in (client.accuracy, zeroshot_classification.accuracy, linear_probe.accuracy):
        assert found(scores, labels, topk=(1, 5)) == pytest.approx(by_hand, abs=1e-12)


def test_wrong_input_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert client.main(["eval", "--pretrained", str(tmp_path / "nowhere"), "--dataset", "wds/x", "--quiet"]) == 2
    assert "not a model folder" in capsys.readouterr().err
    assert client.main(["eval", "--dataset", "wds/x", "--quiet"]) == 2
    assert "add --pretrained FOLDER" in capsys.readouterr().err
    data = ["--dataset", "wds/x", "--dataset_root", str(tmp_path), "--num_workers", "0", "--quiet"]
    assert client.main(["eval", "--pretrained", str(model), *data]) == 2
    assert "nshards.txt" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_command(model: Path, digits: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmpretrain.interop.clip_benchmark", "eval", "--pretrained", str(model)]
    data = ["--dataset", "wds/digits", "--dataset_root", str(digits), "--task", "zeroshot_classification"]
    out = ["--no_amp", "--num_workers", "1", "--output", str(tmp_path / "{model}_{dataset}.json")]
    done = subprocess.run([*command, *data, *out], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "mmpretrain_digits.json").read_text())["metrics"]["acc1"] > 0


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A model that open_clip can hold, and its export as open_clip's folder."""
    out_of = pytest.importorskip("mmpretrain.interop.open_clip_out")
    own = save_clip(tmp_path / "own")
    out_of.export(own, tmp_path / "open_clip")
    yield own, tmp_path / "open_clip"


def test_the_open_clip_export_scores_the_same(exported: tuple[Path, Path], digits: Path, tmp_path: Path) -> None:
    own, folder = exported
    data = ["--dataset", "wds/digits", "--dataset_root", str(digits), "--task", "zeroshot_classification"]
    there = ["--model_type", "open_clip", "--model", f"local-dir:{folder}", "--pretrained", ""]
    got = theirs(tmp_path / "r.json", *data, *there)
    expected = ZeroShotClassification(partial(BenchmarkData, digits))(load(own))
    for name, ours in (("acc1", "top1"), ("acc5", "top5"), ("mean_per_class_recall", "mean_class_recall")):
        assert got[name] == pytest.approx(expected[ours], abs=1e-6)


def save_clip(folder: Path) -> Path:
    """A CLIP of OpenAI's form, but small, with its own tokenizer."""
    config: dict[str, Any] = {
        "model": {
            "_target_": "mmpretrain.MultimodalModel",
            "embed_dim": 32,
            "encoders": {
                "image": {
                    "_target_": "mmpretrain.ImageEncoder",
                    "name": "vit_base_patch32_clip_224",
                    "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1},
                },
                "text": {
                    "_target_": "mmpretrain.TextEncoder",
                    "vocab_size": 49408,
                    "eos_id": 49407,
                    "context_length": 77,
                    "width": 64,
                    "depth": 1,
                    "num_heads": 1,
                },
            },
        },
        "preprocess": {"_target_": "mmpretrain.data.preprocess.Preprocess", "image_size": 32},
        "tokenizer": {"_target_": "mmpretrain.data.tokenizer.ClipTokenizer", "context_length": 77},
    }
    torch.manual_seed(0)
    return save(folder, instantiate(config["model"]), config)
