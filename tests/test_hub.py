"""Models pushed to a hub and loaded from it, against a real server on localhost."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from mmpretrain import InputError, hub, load, save
from mmpretrain.cli import main
from mmpretrain.config import instantiate
from mmpretrain.hub_card import model_card, training
from mmpretrain.provenance import FORMAT
from tests.hub_server import TOKEN, Hub
from tests.test_pretrained import CONFIG

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the hub's client, on upload

MANIFEST = {
    "format": FORMAT,
    "time": "2026-01-02T03:04:05Z",
    "command": {"line": ["train"], "folder": "/home/somebody/work", "overrides": [], "configs": []},
    "config": {
        "trainer": {"max_steps": 1234, "precision": "32-true"},
        "data": {"train": "/home/somebody/shards/{000..009}.tar", "global_batch_size": 64},
        "logger": {"wandb": {"api_key": "***"}},
    },
    "seeds": {"seed": 7, "torch": 7},
    "shards": {
        "image_text": {
            "digest": "ab" * 32,
            "samples": 5000,
            "lost": 1,
            "shards": [["/home/somebody/shards/000.tar", 5000, 1, "cd" * 32]],
        }
    },
    "packages": {"mmpretrain": "0.1.0", "torch": "2.13.0"},
    "python": "3.11.0",
    "platform": "Linux",
    "git": {"working_folder": None, "package": None},
    "hardware": {"gpus": [], "world_size": 1},
    "resumed": [],
}
METRICS = {
    "zero_shot/top1": 0.512345,
    "zero_shot/top1/chance": 0.1,
    "zero_shot/top1/ci_low": 0.48,
    "zero_shot/top1/ci_high": 0.54,
    "train/steps": 1234.0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("hub") / "model", instantiate(CONFIG["model"]), CONFIG, "made for this test")


@pytest.fixture
def run(model, tmp_path):
    """A run folder with a model, a manifest and metrics, and files that nobody should see."""
    folder = tmp_path / "run"
    shutil.copytree(model, folder / "model")
    (folder / "manifest.json").write_text(json.dumps(MANIFEST), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(METRICS), encoding="utf-8")
    (folder / "model" / "secret.env").write_text("HF_TOKEN=hf_mine", encoding="utf-8")
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with Hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield found


def same(first: Path, second: Path) -> bool:
    a, b = (load(folder).model.state_dict() for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_pushed_loads_with_equal_weights(server, run):
    address = hub.push(run, "somebody/a-model", licence="apache-2.0")
    assert address.startswith(f"{server.url}/somebody/a-model/commit/")
    files = server.files("somebody/a-model")
    assert set(files) == {
        "README.md",
        "config.yaml",
        "golden.safetensors",
        "identity.json",
        "model.safetensors",
        "training.json",
    }
    found = hub.download("somebody/a-model")
    assert same(found, run / "model")
    assert same(load_name("hf-hub:somebody/a-model"), run / "model")
    assert any(line.startswith("PUT /lfs/") for line in server.seen)  # weights travel as large files


def load_name(name: str) -> Path:
    from mmpretrain.interop.remote import resolve

    load(name)
    return resolve(name)


def test_a_second_push_replaces_the_first_and_an_old_revision_stays(server, run, tmp_path):
    first = hub.push(run, "somebody/a-model").rpartition("/")[2]
    torch.manual_seed(1)
    other = save(tmp_path / "other", instantiate(CONFIG["model"]), CONFIG)
    hub.push(other, "somebody/a-model")
    assert "training.json" not in server.files("somebody/a-model")  # of the first model, not of this one
    assert same(hub.download("somebody/a-model"), other)
    assert same(hub.download("somebody/a-model", first), run / "model")
    assert not same(hub.download("somebody/a-model"), run / "model")


def test_without_a_connection_what_was_fetched_loads(server, run, monkeypatch):
    from huggingface_hub import constants

    hub.push(run, "somebody/a-model")
    fetched = hub.download("somebody/a-model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.download("somebody/a-model") == fetched
    with pytest.raises(InputError, match="somebody/another"):
        hub.download("somebody/another")
    load("hf-hub:somebody/a-model")


def test_pickles_and_what_is_no_part_of_a_model_are_not_downloaded(server, run, model):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch /tmp/never",)

    files = {path.name: path.read_bytes() for path in model.iterdir()}
    evil = pickle.dumps(Evil())
    server.publish(
        "somebody/a-model",
        {**files, "pytorch_model.bin": evil, "model.pt": evil, "run.py": b"import os", "sub/x.safetensors": b"x"},
    )
    found = hub.download("somebody/a-model")
    assert {path.name for path in found.iterdir()} == set(files)
    load("hf-hub:somebody/a-model")
    assert not [line for line in server.seen if any(name in line for name in (".bin", ".pt", ".py", "sub/"))]


def test_a_repository_of_pickles_alone_is_refused_and_nothing_is_fetched(server):
    data = io.BytesIO()
    torch.save({"x": torch.ones(2)}, data)
    config = {"model_cfg": {"embed_dim": 4, "vision_cfg": {}, "text_cfg": {}}}
    server.publish(
        "somebody/pickled",
        {"open_clip_pytorch_model.bin": data.getvalue(), "open_clip_config.json": json.dumps(config).encode()},
    )
    with pytest.raises(InputError, match="holds no model folder"):
        hub.download("somebody/pickled")
    with pytest.raises(InputError, match="pickle"):
        load("hf-hub:somebody/pickled")
    assert not [line for line in server.seen if ".bin" in line]


def test_a_model_that_was_tampered_with_on_the_hub_is_refused(server, run, model):
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    changed = files["config.yaml"].replace(b"image_size: 16", b"image_size: 16\n  resize: squash")
    assert changed != files["config.yaml"]
    server.publish("somebody/a-model", {**files, "config.yaml": changed})
    with pytest.raises(InputError, match=r"preprocess.resize is 'squash', the card says 'crop'"):
        load("hf-hub:somebody/a-model")


def test_what_the_hub_refuses_is_said_in_one_line(server, run, monkeypatch):
    with pytest.raises(InputError, match="cannot fetch hf-hub:nobody/nothing: RepositoryNotFoundError"):
        hub.download("nobody/nothing")
    hub.push(run, "somebody/a-model", private=True)
    assert server.repositories["somebody/a-model"].private
    with pytest.raises(InputError, match="RevisionNotFoundError"):
        hub.download("somebody/a-model", "0" * 40)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(InputError, match=r"cannot push to hf-hub:somebody/mine: .*401") as refused:
        hub.push(run, "somebody/mine")
    assert "\n" not in str(refused.value) and "wrong" not in str(refused.value)


@pytest.mark.parametrize(
    ("repository", "licence", "message"),
    [
        ("name", None, "names no repository; expected org/name"),
        ("a/b/c", None, "names no repository"),
        ("../x", None, "names no repository"),
        ("a/b", "MIT license\nevil: true", "licence="),
    ],
)
def test_bad_names_are_refused_before_anything_is_asked(server, run, repository, licence, message):
    with pytest.raises(InputError, match=message):
        hub.push(run, repository, licence)
    assert server.seen == []


def test_only_what_is_verified_is_pushed(server, run):
    (run / "model" / "golden.safetensors").unlink()
    (run / "model" / "identity.json").unlink()
    with pytest.raises(InputError, match="has no identity card; write one with `mmpretrain card"):
        hub.push(run, "somebody/a-model")
    assert server.seen == []


def test_a_model_card_says_how_to_load_what_was_measured_and_how_it_was_trained(run):
    text = model_card(run / "model", "somebody/a-model", "apache-2.0")
    head = yaml.safe_load(text.split("---")[1])
    assert head == {
        "library_name": "mmpretrain",
        "license": "apache-2.0",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["mmpretrain", "image", "text"],
    }
    for part in (
        'mmpretrain.load("hf-hub:somebody/a-model")',
        "| `zero_shot/top1` | 0.5123 | 0.48 to 0.54 | 0.1 |",
        "- data `image_text`: 5000 samples in 1 shards, digest `abab",
        "- steps: 1234",
        "- versions: mmpretrain 0.1.0, torch 2.13.0, Python 3.11.0",
        "- `preprocess.resize`: `crop`",
        "Source: made for this test.",
    ):
        assert part in text, part
    published = (training(run / "model") or b"").decode()
    assert "somebody" not in published and "command" not in json.loads(published)
    assert json.loads(published)["config"]["data"]["train"] == ".../{000..009}.tar"
    alone = model_card(run / "model", "somebody/a-model")
    assert "Not stated." in alone and "license" not in yaml.safe_load(alone.split("---")[1])


def test_a_model_card_without_a_run_says_so(model):
    text = model_card(model, "somebody/a-model")
    assert "None were pushed." in text and "is not the model of a run" in text
    assert training(model) is None


def test_what_else_lies_in_a_run_is_not_what_the_run_measured(run, monkeypatch):
    averaged = shutil.copytree(run / "model", run / "averaged")
    text = model_card(averaged, "somebody/a-model")
    assert training(averaged) is None and "zero_shot" not in text and "- steps:" not in text
    monkeypatch.chdir(run / "model")
    assert "| `zero_shot/top1` | 0.5123" in model_card(Path(), "somebody/a-model")


def test_text_of_strangers_stays_text_in_a_model_card(run):
    changed = {**METRICS, "x` | <script>alert(1)</script> [a](http://b)\n# title": 1.0}
    (run / "metrics.json").write_text(json.dumps(changed), encoding="utf-8")
    text = model_card(run / "model", "somebody/a-model")
    assert "<script>" not in text and "\n# title" not in text and "](http" not in text


def test_the_dry_run_prints_the_card_and_sends_nothing(server, run, capsys):
    assert main(["push", str(run), "somebody/a-model", "--licence", "mit", "--dry-run"]) == 0
    assert "license: mit" in capsys.readouterr().out and server.seen == []


def test_the_command_pushes(server, run, capsys):
    assert main(["push", str(run), "somebody/a-model", "--private"]) == 0
    assert capsys.readouterr().out.strip().startswith(f"{server.url}/somebody/a-model/commit/")
    assert server.repositories["somebody/a-model"].private
    assert server.files("somebody/a-model")["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
