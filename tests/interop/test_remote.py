"""Published models are fetched by name, checked, and converted once; no test leaves this machine."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

import mmpretrain
from mmpretrain.errors import InputError
from mmpretrain.interop import fetch, remote
from mmpretrain.interop.converted import write
from mmpretrain.interop.openai import from_state_dict
from tests.interop.openai_models import released, tiny_clip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def served(tmp_path):
    """A folder that is served, its address, and the paths that were asked for."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub: `hub/org/name` is a repository."""
    import huggingface_hub

    root = tmp_path / "hub"

    class Api:
        def list_repo_files(self, repository, revision=None):
            if not (root / repository).is_dir():
                raise FileNotFoundError(f"404 {repository}@{revision}")
            return sorted(path.name for path in (root / repository).iterdir())

    def snapshot_download(repository, revision=None, allow_patterns=()):
        target = tmp_path / "snapshots" / repository.replace("/", "--") / "0123abc"
        target.mkdir(parents=True, exist_ok=True)
        for name in (name for name in allow_patterns if (root / repository / name).is_file()):
            (target / name).write_bytes((root / repository / name).read_bytes())
        return str(target)

    def hf_hub_download(repository, name, revision=None):
        return str(root / repository / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return root


def published(served, monkeypatch, kind="resnet"):
    folder, address, _ = served
    torch.save(released(tiny_clip(kind)), folder / "tiny.pt")
    digest = hashlib.sha256((folder / "tiny.pt").read_bytes()).hexdigest()
    (folder / digest).mkdir()
    (folder / "tiny.pt").rename(folder / digest / "tiny.pt")
    monkeypatch.setattr(remote, "OPENAI_URL", address)
    monkeypatch.setattr(remote, "OPENAI", {"tiny/1": f"{digest}/tiny.pt"})
    return folder / digest / "tiny.pt"


def test_a_model_is_fetched_and_converted_once(served, monkeypatch, cache):
    published(served, monkeypatch)
    folder = remote.resolve("openai:tiny/1")
    assert cache in folder.parents
    again = remote.resolve("openai:tiny/1")
    assert again == folder
    assert len(served[2]) == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing is left beside it
    model = mmpretrain.load("openai:tiny/1").model
    weights = from_state_dict(released(tiny_clip("resnet"))).weights
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_damaged_folder_of_the_cache_is_named_before_anything_is_fetched(served, monkeypatch):
    published(served, monkeypatch)
    remote._folder("openai:tiny/1").mkdir(parents=True)
    with pytest.raises(InputError, match=r"is damaged: it has no config\.yaml; remove it"):
        remote.resolve("openai:tiny/1")
    assert not served[2]


def test_a_file_that_is_not_what_was_published_is_refused(served, monkeypatch, cache):
    path = published(served, monkeypatch)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"has the SHA-256 .* instead of"):
        remote.resolve("openai:tiny/1")
    assert not list(cache.rglob("config.yaml"))


def test_a_file_that_is_not_there_is_named(served, monkeypatch):
    published(served, monkeypatch).unlink()
    with pytest.raises(InputError, match=r"cannot fetch http://127\.0\.0\.1.*404"):
        remote.resolve("openai:tiny/1")


def test_another_process_may_have_been_first(monkeypatch, cache):
    converted = from_state_dict(released(tiny_clip("resnet")))
    folder = write(converted, cache / "models" / "x")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    remote._keep(converted, folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == ["x"]


def test_names_that_are_not_known_are_refused():
    with pytest.raises(InputError, match=r"no CLIP called 'ViT-B/33'; nearest: ViT-B/32"):
        remote.resolve("openai:ViT-B/33")
    with pytest.raises(InputError, match=r"names no published model; expected open_clip:NAME, openai:NAME, "):
        remote.resolve("timm:x")
    with pytest.raises(InputError, match="names no repository"):
        remote.resolve("hf-hub:../secret")
    with pytest.raises(InputError, match="packages no config 'ViT-B-33/openai'"):
        remote.resolve("open_clip:ViT-B-33/openai")
    with pytest.raises(InputError, match="has no weights 'laion' of ViT-B-32; it has openai, "):
        remote.resolve("open_clip:ViT-B-32/laion")
    with pytest.raises(InputError, match="is a model without weights; give open_clip:ViT-B-32/TAG"):
        remote.resolve("open_clip:ViT-B-32")


def test_open_clips_table_needs_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match="pip install"):
        remote.resolve("open_clip:ViT-B-32/openai")


def test_the_files_of_openai_are_those_that_open_clip_knows():
    from open_clip.pretrained import get_pretrained_url, list_pretrained_models_by_tag

    known = {get_pretrained_url(model, "openai") for model in list_pretrained_models_by_tag("openai")}
    assert known == {f"{remote.OPENAI_URL}/{path}" for path in remote.OPENAI.values()}


TINY = {
    "embed_dim": 48,
    "vision_cfg": {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


@pytest.mark.parametrize("place", ["hub", "url"])
def test_the_tag_of_open_clip_says_pixels_and_activation(place, hub, served, monkeypatch):
    from mmpretrain.interop import open_clip_in

    model = tiny_clip("vit")
    tag = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3), "interpolation": "bilinear", "resize_mode": "squash"}
    if place == "hub":
        (hub / "org" / "tiny").mkdir(parents=True)
        save_file(model.state_dict(), hub / "org" / "tiny" / "open_clip_model.safetensors")
        (hub / "org" / "tiny" / "open_clip_pytorch_model.bin").write_bytes(b"not to be read")
        tag["hf_hub"] = "org/tiny/"
    else:
        torch.save(model.state_dict(), served[0] / "x.pt")
        digest = hashlib.sha256((served[0] / "x.pt").read_bytes()).hexdigest()[:8]
        (served[0] / "x.pt").rename(served[0] / f"x-{digest}.pt")
        tag["url"] = f"{served[1]}/x-{digest}.pt"
    monkeypatch.setattr(open_clip_in, "packaged", lambda name: ({**TINY, "quick_gelu": True}, tag))
    made = remote.fetch("open_clip:tiny/tag")
    assert made.config["model"]["encoders"]["text"]["activation"] == "quick_gelu"
    preprocess = made.config["preprocess"]
    assert (preprocess["resize"], preprocess["interpolation"]) == ("squash", "bilinear")
    assert list(made.config["model"]["encoders"]["image"]["mean"]) == [0.5, 0.4, 0.3]
    assert made.source == "open_clip:tiny/tag"


def test_a_repository_of_the_hub_is_converted_by_the_files_it_has(hub):
    repository = hub / "org" / "clip"
    repository.mkdir(parents=True)
    save_file(tiny_clip("vit").state_dict(), repository / "open_clip_model.safetensors")
    (repository / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**TINY, "quick_gelu": True}}))
    (repository / "pytorch_model.bin").write_bytes(b"transformers' own, not to be read")
    for name in ("hf-hub:org/clip", "open_clip:hf-hub:org/clip"):
        made = remote.fetch(name)
        assert made.source == "hf-hub:org/clip@0123abc"
        assert made.config["model"]["embed_dim"] == 48
    (repository / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights: none of open_clip_model"):
        remote.fetch("hf-hub:org/clip")


def test_a_pickle_is_not_fetched_from_the_hub(hub):
    repository = hub / "org" / "old"
    repository.mkdir(parents=True)
    (repository / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (repository / "pytorch_model.bin").write_bytes(b"not to be read")
    with pytest.raises(InputError, match=r"in a pickle only \(pytorch_model\.bin\).*download the repository yourself"):
        remote.fetch("hf-hub:org/old")
    assert not list(hub.parent.glob("snapshots/*/*/*.bin"))


def test_an_index_of_the_hub_that_is_none_is_named(hub):
    repository = hub / "org" / "parts"
    repository.mkdir(parents=True)
    (repository / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (repository / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(InputError, match=r"index\.json is no index of weights"):
        remote.fetch("hf-hub:org/parts")


def test_a_model_folder_of_ours_is_taken_as_it_is(hub, cache):
    write(from_state_dict(released(tiny_clip("resnet"))), hub / "org" / "ours")
    folder = remote.resolve("hf-hub:org/ours")
    assert folder.name == "0123abc"
    assert mmpretrain.load(folder).model.embed_dim == 48
    assert not (cache / "models").exists()


def test_a_repository_that_is_no_model_or_not_there_is_named(hub):
    with pytest.raises(InputError, match="cannot fetch hf-hub:org/none: FileNotFoundError: 404"):
        remote.resolve("hf-hub:org/none")
    (hub / "org" / "text").mkdir(parents=True)
    (hub / "org" / "text" / "README.md").write_text("nothing")
    with pytest.raises(InputError, match="so no model we know"):
        remote.resolve("hf-hub:org/text")
    with pytest.raises(InputError, match=r"has none of x\.bin"):
        fetch.hub_file("org/text", ["x.bin"])
