"""Searching finds the nearest by the model's own similarity, exactly for few and nearly so for many."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mmpretrain import InputError, load
from mmpretrain.cli import main
from mmpretrain.embedding import index as module
from mmpretrain.embedding.index import VectorIndex
from mmpretrain.embedding.parts import Manifest, Rows, Store
from tests.embedding.test_embed import model, pictures, rows_of  # noqa: F401 (fixtures)

pytest.importorskip("faiss")


@pytest.fixture
def embedded(model, pictures, tmp_path):  # noqa: F811
    assert main(["embed", str(model), str(pictures), str(tmp_path / "out"), "--part-size", "6"]) == 0
    return tmp_path / "out"


def vectors(count, width, seed=0):
    found = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def store_of(folder, embeddings, part_size=1000):
    count, width = embeddings.shape
    manifest = Manifest("m", "w", "image", width, "s", None, None, "d", count, part_size, "npy", "float32")
    store = Store.create(folder, manifest, False)
    for part in range(manifest.parts):
        items = manifest.items(part)
        names = [f"key {i}" for i in items]
        store.write(part, Rows(list(items), names, names, [""] * len(items), embeddings[items.start : items.stop]), [])
    return store


def test_text_and_picture_queries_give_the_order_of_their_similarities(embedded, model, pictures, capsys):  # noqa: F811
    keys, embeddings = rows_of(embedded)
    network, preprocess, tokenizer = load(model)
    queries = {
        ("a red bicycle",): network.embed("text", tokenizer(["a red bicycle"])),
        ("--image", str(pictures / "a" / "01.png")): network.embed(
            "image", preprocess(Image.open(pictures / "a" / "01.png"))[None]
        ),
    }
    for arguments, query in queries.items():
        capsys.readouterr()
        assert main(["search", str(embedded), *arguments, "-k", "5", "--json"]) == 0
        hits = json.loads(capsys.readouterr().out)
        scores = embeddings @ query.detach().numpy()[0]
        order = np.argsort(-scores)[:5]
        assert [hit["key"] for hit in hits] == [keys[i] for i in order]
        assert np.allclose([hit["score"] for hit in hits], scores[order], atol=1e-5)
    assert hits[0]["key"] == "a/01.png"


def test_the_page_holds_the_pictures_and_no_markup_of_strangers(embedded, tmp_path, capsys):
    page = tmp_path / "found.html"
    assert main(["search", str(embedded), "<script>alert(1)</script>", "--html", str(page), "-k", "4"]) == 0
    text = page.read_text()
    assert text.count("data:image/webp;base64,") == 4
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "embeddings (all)" in capsys.readouterr().err


def test_many_vectors_are_searched_in_lists_that_find_nearly_all(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXACT_UP_TO", 2000)
    embeddings = vectors(6000, 16)
    store_of(tmp_path, embeddings)
    index = VectorIndex.open(tmp_path)
    assert index.about.lists == round(4 * 6000**0.5) and 0.99 <= index.about.recall <= 1
    opened = VectorIndex.open(tmp_path)  # from its file
    assert opened.about == index.about and opened.index.nprobe == index.about.probes
    found = 0
    for query in vectors(50, 16, seed=1):
        truth = set(np.argsort(-(embeddings @ query))[:10].tolist())
        hits = opened.search(query, 10)
        found += len(truth & {hit.item for hit in hits})
        assert all(hit.key == f"key {hit.item}" for hit in hits)
    assert found >= 0.97 * 500


def test_an_index_is_made_anew_for_other_embeddings(tmp_path):
    store_of(tmp_path, vectors(20, 8))
    first = VectorIndex.open(tmp_path)
    shutil.rmtree(tmp_path)
    store_of(tmp_path, vectors(30, 8, seed=2))
    (tmp_path / module.ABOUT).write_text(json.dumps(first.about._asdict()))
    assert VectorIndex.open(tmp_path).about.embeddings == 30


def test_a_damaged_index_is_made_anew(tmp_path):
    store_of(tmp_path, vectors(20, 8))
    VectorIndex.open(tmp_path)
    file = tmp_path / module.INDEX
    file.write_bytes(file.read_bytes()[:-9])
    query = vectors(1, 8, seed=3)[0]
    assert len(VectorIndex.open(tmp_path).search(query, 20)) == 20


def test_what_cannot_be_searched_is_said(embedded, model, tmp_path, capsys):  # noqa: F811
    assert main(["search", str(embedded)]) == 2
    assert "give a text to search for, or a picture" in capsys.readouterr().err
    assert main(["search", str(embedded), " "]) == 2
    assert "the text to search for is empty" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"query has shape \(3,\); expected \(16,\)"):
        VectorIndex.open(embedded).search(np.zeros(3, np.float32), 1)
    next(embedded.glob("part-00001.parquet")).unlink()
    assert main(["search", str(embedded), "x"]) == 2
    assert "lacks 1 of 4 parts; run the same `mmpretrain embed` again" in capsys.readouterr().err
    store_of(tmp_path / "other", vectors(5, 16))
    assert main(["search", str(tmp_path / "other"), "x"]) == 2
    assert "is not where it was" in capsys.readouterr().err
    assert main(["search", str(tmp_path / "other"), "x", "--model", str(model)]) == 2
    assert "is another model (weights, config or tokenizer)" in capsys.readouterr().err


def test_a_picture_that_moved_is_not_shown_under_another_name(model, tmp_path):  # noqa: F811
    folder, page = tmp_path / "p", tmp_path / "page.html"
    folder.mkdir()
    for name in "bcd":
        Image.effect_noise((20, 20), 20 + ord(name)).save(folder / f"{name}.png")
    assert main(["embed", str(model), str(folder), str(tmp_path / "out")]) == 0
    Image.new("RGB", (20, 20), "red").save(folder / "a.png")
    assert main(["search", str(tmp_path / "out"), "--image", str(folder / "d.png"), "--html", str(page)]) == 0
    assert "data:image/webp" not in page.read_text()
    folder.rename(tmp_path / "elsewhere")
    assert main(["search", str(tmp_path / "out"), "a cat", "--html", str(page)]) == 0
    assert "c.png" in page.read_text()
