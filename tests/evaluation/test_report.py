from __future__ import annotations

import base64
import io
import math
import re
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib._pylab_helpers import Gcf
from PIL import Image
from sklearn.datasets import load_sample_image
from sklearn.decomposition import PCA
from torch.nn import functional as F

from mmpretrain.errors import InputError
from mmpretrain.evaluation.gallery import Answers
from mmpretrain.evaluation.report import Gallery, Report, write_report
from tests.evaluation.report_example import digits, example, history, metrics

EMPTY = Report("Nothing yet", {}, [], "", {}, None, None)
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A page's elements, its text, and a failure where tags do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def written(tmp_path: Path, report: Report) -> Page:
    write_report(tmp_path / "runs" / "report.html", report)
    return Page(tmp_path / "runs" / "report.html")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(tmp_path_factory.mktemp("report"), example())


def test_page_has_every_part(page: Page) -> None:
    headings = [tag for tag, _ in page.elements if tag in ("h1", "h2")]
    assert headings == ["h1"] + ["h2"] * 9
    for part in (
        "Zero-shot results",
        "Loss",
        "Logit scale",
        "Learning rate",
        "Throughput",
        "Text queries",
        "Picture queries",
        "Worst mistakes",
        "Written captions",
        "Similarity matrix",
        "Map of the shared space",
        "Resolved config",
        "CC BY 4.0",
        "E. Alpaydin and C. Kaynak",
        "embed_dim: 32",
        "2.10.0",
    ):
        assert part in page.words, part
    assert "42.1%" in page.words
    assert "168× chance (0.25%)" in page.words
    assert "38.1% – 47.1%" in page.words


def test_page_needs_nothing_else(page: Page) -> None:
    assert not page.all("script")
    assert all(image["src"].startswith("data:image/webp;base64,") for image in page.all("img"))
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            address = attributes.get(name) or "#"
            # The one address is a link to click, never loaded.
            assert address.startswith(("#", "data:")) or (tag, address) == ("a", example().card["url"])
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv"))["content"]
    assert policy.startswith("default-src 'none'")


def test_page_is_accessible(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img"))
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(header.get("scope") for header in page.all("th"))
    identities = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(identities) == len(set(identities))
    targets = [link["href"][1:] for link in page.all("a") if link["href"].startswith("#")]
    assert len(targets) == 9
    assert set(targets) <= set(identities)
    # Drawn references point to what the same page defines.
    for _, attributes in page.elements:
        for value in (attributes.get("xlink:href") or "", attributes.get("clip-path") or ""):
            for name in re.findall(r"#([^)]+)", value):
                assert name in identities


def test_right_answers_are_marked_in_words(tmp_path: Path) -> None:
    perfect = digits(40)
    perfect = perfect._replace(text_embeddings=perfect.image_embeddings)
    page = written(tmp_path, example()._replace(gallery=perfect))
    ticks = [mark for mark in page.all("span") if mark.get("class") == "tick"]
    assert len(ticks) == 8 + 8  # one right answer to each query, and no mistake
    assert all(mark["aria-label"] == "right" for mark in ticks)
    assert "every caption finds its picture first" in page.words


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}"])
def test_untrusted_text_stays_text(tmp_path: Path, evil: str) -> None:
    gallery = digits(12)
    gallery = gallery._replace(captions=[f"{evil} {index}" for index in range(12)], generated=[evil for _ in range(12)])
    page = written(
        tmp_path,
        Report(
            evil,
            {f"{evil}/recall@1": 0.5, f"{evil}/recall@1/chance": 0.1},
            [{"step": 1, f"loss/{evil}": 1.0, "loss/total": 2.0}],
            evil,
            {evil: evil},
            {"name": evil, "licence": evil, "attribution": evil, "url": "javascript:alert(1)"},
            gallery,
        ),
    )
    assert not page.all("script")
    assert not any("onerror" in attributes or attributes.get("src") == "x" for _, attributes in page.elements)
    assert not any((link["href"] or "").startswith("javascript") for link in page.all("a"))
    assert page.words.count(evil) > 20
    assert any(f"{evil} 0" in (image["alt"] or "") for image in page.all("img"))


@given(data=st.data())
def test_ranks_match_a_plain_reference(data: st.DataObject) -> None:
    pictures = data.draw(st.integers(1, 7))
    owners = [*range(pictures), *data.draw(st.lists(st.integers(0, pictures - 1), max_size=6))]
    captions = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=len(owners), max_size=len(owners)))
    seed = data.draw(st.integers(0, 1000))
    random = np.random.default_rng(seed)
    by_caption = {caption: random.normal(size=3) for caption in sorted(set(captions))}
    image = random.normal(size=(pictures, 3))
    image[random.integers(0, pictures)] = image[0]  # ties happen
    gallery = Gallery(
        [Image.new("RGB", (4, 4))] * pictures,
        captions,
        owners,
        torch.tensor(image),
        torch.tensor(np.stack([by_caption[caption] for caption in captions])),
        None,
    )
    found = Answers(gallery)

    def expected(scores: dict[int, float], right: set[int]) -> int:
        best = max(scores[item] for item in right)
        return 1 + sum(score > best - 1e-6 for item, score in scores.items() if item not in right)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert sorted(found.texts) == sorted(set(captions))
    for query in found.text_queries():
        text = found.texts[query.item]
        right = {owner for owner, caption in zip(owners, captions) if caption == text}
        scores = {item: cosine(by_caption[text], image[item]) for item in range(pictures)}
        assert query.rank == expected(scores, right)
        assert [a.score for a in query.answers] == pytest.approx(sorted(scores.values(), reverse=True)[:5], abs=1e-5)
        assert all(answer.right == (answer.item in right) for answer in query.answers)
    for query in found.picture_queries():
        right = {found.texts.index(c) for owner, c in zip(owners, captions) if owner == query.item}
        scores = {i: cosine(by_caption[text], image[query.item]) for i, text in enumerate(found.texts)}
        assert query.rank == expected(scores, right)


def test_a_collapsed_model_looks_bad() -> None:
    gallery = digits(30)
    same = torch.ones(30, 8)
    found = Answers(gallery._replace(image_embeddings=same, text_embeddings=same))
    assert {query.rank for query in found.text_queries() + found.picture_queries()} == {30}
    assert not any(answer.right for query in found.text_queries() for answer in query.answers)
    assert {mistake.rank for mistake in found.mistakes()} == {30}


def test_mistakes_are_the_lowest_ranks() -> None:
    gallery = digits(60, noise=3.0)
    scores = F.normalize(gallery.text_embeddings, dim=1) @ F.normalize(gallery.image_embeddings, dim=1).T
    ranks = (scores >= scores.diagonal()[:, None]).sum(dim=1)
    mistakes = Answers(gallery).mistakes()
    assert [mistake.rank for mistake in mistakes] == sorted(ranks.tolist(), reverse=True)[:6]
    for mistake in mistakes:
        assert mistake.right.item == mistake.text  # a caption each, in order
        assert mistake.chosen.item == int(scores[mistake.text].argmax()) != mistake.right.item


def test_map_is_the_principal_components() -> None:
    gallery = digits(50)
    image, text = (F.normalize(e, dim=1) for e in (gallery.image_embeddings, gallery.text_embeddings))
    reference = PCA(n_components=2).fit(torch.cat([image, text]).double().numpy())
    places = Answers(gallery).map()
    expected = reference.transform(torch.cat([image, text]).double().numpy())
    np.testing.assert_allclose(torch.cat([places.image, places.text]).abs(), np.abs(expected), atol=1e-4)
    assert places.variance == pytest.approx(tuple(reference.explained_variance_ratio_), abs=1e-4)
    assert places.gap == pytest.approx(float((image.mean(0) - text.mean(0)).norm()), abs=1e-5)


def test_matrix_marks_right_pairs_and_best_of_each_row() -> None:
    matrix = Answers(digits(400)).matrix()
    assert matrix.images[0] == 0
    assert matrix.images[-1] == 399
    for index, row in enumerate(matrix.rows):
        assert [cell.right for cell in row] == [column == index for column in range(12)]
        assert [cell.best for cell in row] == [cell.score == max(c.score for c in row) for cell in row]
    heats = [cell.heat for row in matrix.rows for cell in row]
    assert (min(heats), max(heats)) == (0.0, 1.0)


def test_same_report_gives_the_same_bytes_also_in_threads(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    paths = [tmp_path / f"{number}.html" for number in range(3)]
    write_report(paths[0], example(50))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda path: write_report(path, example(50)), paths[1:]))
    assert len({path.read_bytes() for path in paths}) == 1
    assert not Gcf.figs  # nothing of pyplot's
    assert dict(mpl.rcParams) == before


def test_400_photographs_stay_small(tmp_path: Path) -> None:
    photograph = load_sample_image("china.jpg")
    gallery = digits(400)
    corners = [(y, x) for y in range(0, 200, 10) for x in range(0, 400, 20)]
    images = [Image.fromarray(photograph[y : y + 224, x : x + 224]) for y, x in corners]
    write_report(tmp_path / "report.html", example()._replace(gallery=gallery._replace(images=images)))
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_long_history_stays_small(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", EMPTY._replace(history=history(20_000)))
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_pictures_of_any_mode_and_shape(tmp_path: Path) -> None:
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
    sizes = ((1, 300), (500, 2), (64, 64), (8, 8))
    images = [Image.new(mode, size) for mode, size in zip(modes, sizes * 2)]
    images += [Image.new(mode, size) for mode, size in zip(modes, sizes[::-1] * 2)]
    page = written(tmp_path, EMPTY._replace(gallery=digits(16)._replace(images=images)))
    for attributes in page.all("img"):
        with Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))) as shown:
            assert shown.mode == "RGB"
            assert 64 <= max(shown.size) <= 128


def test_transparency_is_white(tmp_path: Path) -> None:
    gallery = digits(1)._replace(images=[Image.new("RGBA", (100, 100), (255, 0, 0, 0))])
    source = written(tmp_path, EMPTY._replace(gallery=gallery)).all("img")[0]["src"]
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as shown:
        assert shown.getpixel((50, 50)) == (255, 255, 255)


def test_empty_report_is_a_page_that_says_so(tmp_path: Path) -> None:
    page = written(tmp_path, EMPTY)
    assert [tag for tag, _ in page.elements if tag in ("h1", "h2")] == ["h1", "h2"]
    for part in ("No metrics were given", "No training history", "No gallery", "No config, versions"):
        assert part in page.words
    assert not page.all("img") and not page.all("svg")


@pytest.mark.parametrize(
    "report",
    [
        EMPTY._replace(history=history(1)),
        EMPTY._replace(history=[{"step": 5}]),
        EMPTY._replace(card={}),
        EMPTY._replace(card={"licence": "MIT"}),
        EMPTY._replace(gallery=digits(1)),
        EMPTY._replace(gallery=digits(2)._replace(generated=["", ""])),
        EMPTY._replace(gallery=digits(9)._replace(captions=["the same"] * 9, generated=None)),
        EMPTY._replace(gallery=digits(3)._replace(captions=["", "\ud800", "שלום 猫 $x$ " * 90])),
        EMPTY._replace(gallery=digits(4)._replace(image_embeddings=torch.ones(4, 1), text_embeddings=torch.ones(4, 1))),
        EMPTY._replace(metrics={"accuracy": 1.0}),
        EMPTY._replace(metrics={"loss": -2e-7, "x/chance": 0.1, "y/z": 1e9}),
    ],
)
def test_partial_reports_are_pages(tmp_path: Path, report: Report) -> None:
    page = written(tmp_path, report)
    assert len(page.all("main")) == 1
    assert "1 steps" not in page.words


def test_numbers_that_are_not_finite_are_said_to_be(tmp_path: Path) -> None:
    key = "val/retrieval/text_to_image/recall@1"
    rows = history(20)
    rows[10]["loss/total"] = math.nan
    rows[11]["loss/total"] = math.inf
    page = written(
        tmp_path,
        EMPTY._replace(metrics=metrics() | {key: math.nan, "a": math.inf, "b/chance": 0.0}, history=rows),
    )
    assert "recall@1 not a number" in page.words
    assert "∞" in page.words
    assert "total: 2 of 20 values are not finite numbers" in page.words
    assert not re.search(r"\bnan\b", page.words)
    assert "nan%" not in str(page.elements)


def test_the_health_panel_draws_what_was_measured(tmp_path: Path) -> None:
    rows = history(20)
    for row in rows[::10]:
        row |= {"grad_norm/image": 2.0, "grad_norm/text": math.nan, "temperature": 0.07, "embedding_rank/image": 24.0}
        row |= {f"logits/image-text/{name}": 5.0 for name in ("positive", "negative", "hardest_negative")}
        row["modality_gap/image-text"] = 0.7
    page = written(tmp_path, EMPTY._replace(history=rows))
    assert "Health" in page.words
    for title in ("Gradient norm", "Logits", "Temperature", "Embedding rank", "Modality gap"):
        assert title in page.words
    assert "text: 2 of 2 values are not finite numbers" in page.words
    assert "image-text · hardest negative: 5" in page.words
    assert len(page.all("svg")) == 9
    assert "Health" not in written(tmp_path, EMPTY._replace(history=history(20))).words


def test_metrics_without_chance_or_interval_have_no_bar(tmp_path: Path) -> None:
    page = written(tmp_path, EMPTY._replace(metrics={"val/loss": 0.5, "val/median_rank": 1.0}))
    assert not [element for element in page.all("div") if element.get("class") == "bar"]
    assert "loss 0.5 – – –" in page.words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [], "captions": [], "image_of_caption": []}, "0 pictures and 0 captions"),
        ({"image_embeddings": torch.ones(3, 32)}, r"image_embeddings has shape \(3, 32\)"),
        ({"text_embeddings": torch.ones(4)}, r"text_embeddings has shape \(4,\)"),
        ({"text_embeddings": torch.ones(4, 31)}, r"32 \(image\) and 31 \(text\)"),
        ({"text_embeddings": torch.full((4, 32), math.nan)}, "4 of 4 rows that are not finite"),
        ({"image_of_caption": [0, 1, 2, 4]}, "image_of_caption"),
        ({"image_of_caption": [0, 0, 1, 2]}, "leave out pictures without captions"),
        ({"image_of_caption": [0, 1, 2]}, "image_of_caption has 3 entries"),
        ({"generated": ["one"]}, "generated has 1 captions; expected 4"),
    ],
)
def test_a_gallery_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    old = tmp_path / "report.html"
    old.write_text("the last good report")
    with pytest.raises(InputError, match=message):
        write_report(old, EMPTY._replace(gallery=digits(4)._replace(**change)))
    assert old.read_text() == "the last good report"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (EMPTY._replace(metrics={"a": "high"}), "metric 'a' is 'high'"),
        (EMPTY._replace(metrics={"a": {"b": 1.0}}), "flatten nested results"),
        (EMPTY._replace(history=[{"step": 1, "lr": 1.0}, {"lr": 2.0}]), "row 1 .* has no number 'step'"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path: Path, report: Report, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_report(tmp_path / "report.html", report)
