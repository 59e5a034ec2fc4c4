from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from mmpretrain.evaluation.candidates import Candidate
from mmpretrain.evaluation.compare import write_comparison
from mmpretrain.evaluation.confidence import Interval, metric
from mmpretrain.evaluation.results import Measured, work
from mmpretrain.evaluation.tables import csv_text, json_text, rows_of
from tests.evaluation.test_report import Page

SETS = ("vtab/dtd", "pets")


def scores(value: float) -> dict[str, float]:
    return {
        "images": 1000.0,
        **metric("top1", value, Interval(value - 0.05, value + 0.05), 0.1),
        **metric("top5", min(1.0, 2 * value), Interval(value, 1.0), 0.5),
    }


def measured(names: tuple[str, ...] = ("a", "b"), run: str | None = None, task: str = "zero_shot") -> list[Measured]:
    return [
        Measured(
            Candidate(name, run, None if run is None else 100 * (i + 1), f"{i}" * 64, name),
            work(data_set, task, {}, "cpu"),
            scores(0.2 + 0.1 * i + 0.02 * j),
        )
        for i, name in enumerate(names)
        for j, data_set in enumerate(SETS)
    ]


def page_of(tmp_path: Path, found: list[Measured], title: str = "vtab") -> Page:
    write_comparison(tmp_path / "page.html", title, rows_of(found))
    return Page(tmp_path / "page.html")


def test_the_csv_has_a_row_for_each_number() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(rows_of(measured(run="runs/x"))))))
    assert len(rows) == 2 * 2 * 3
    assert rows[1] == {
        "model": "a",
        "run": "runs/x",
        "step": "100",
        "identity": "0" * 64,
        "data_set": "vtab/dtd",
        "task": "zero_shot",
        "metric": "top1",
        "value": "0.2",
        "low": "0.15000000000000002",
        "high": "0.25",
        "chance": "0.1",
    }
    assert (rows[0]["metric"], rows[0]["value"], rows[0]["low"], rows[0]["chance"]) == ("images", "1000.0", "", "")


def test_the_json_has_each_models_metrics_as_one_evaluation_gives_them() -> None:
    content = json.loads(json_text("vtab", measured()))
    assert content["benchmark"] == "vtab" and [model["name"] for model in content["models"]] == ["a", "b"]
    metrics = content["models"][1]["metrics"]
    assert metrics["pets/zero_shot/top1/chance"] == 0.1
    assert metrics["vtab/dtd/zero_shot/top1"] == pytest.approx(0.3)
    assert len(metrics) == 2 * 9


def test_the_page_compares_models(tmp_path: Path) -> None:
    page = page_of(tmp_path, measured())
    assert "22.0%" in page.words and "17.0% – 27.0%" in page.words
    assert "average of 2 data sets" in page.words and "31.0%" in page.words
    assert "Over training" not in page.words
    assert len(page.all("svg")) == 2
    best = [cell for cell in page.all("td") if "best" in (cell.get("class") or "").split()]
    assert len(best) == 2 + 1 + 4  # headlines, their average, and every number below that has a chance level


def test_the_page_draws_runs_over_their_steps(tmp_path: Path) -> None:
    page = page_of(tmp_path, [*measured(run="runs/x"), *measured(("c", "d"), "runs/y"), *measured(("e",))])
    assert "Over training" in page.words and "run 2" in page.words
    assert "run 1: 20.0% at step 100 → 30.0% at step 200" in page.words
    assert len(page.all("svg")) == 4
    alone = page_of(tmp_path, measured(("c",), "runs/x"))
    assert "Over training" not in alone.words


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "$x^$ ₿ 日本"]
)
def test_names_stay_text(tmp_path: Path, evil: str) -> None:
    found = [
        one._replace(work=one.work._replace(data_set=f"{evil} {one.work.data_set}"))
        for one in measured((evil, f"{evil} 2"), evil, task="task")
    ]
    page = page_of(tmp_path, found, evil)
    assert not page.all("script") and not page.all("img")
    assert evil in page.words
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_the_page_needs_nothing_else_and_is_accessible(tmp_path: Path) -> None:
    page = page_of(tmp_path, measured(tuple(f"model {i}" for i in range(30)), "runs/x"))
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv"))["content"]
    assert policy is not None and policy.startswith("default-src 'none'")
    assert not page.all("script") and "AD" in page.words
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    identities = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(identities) == len(set(identities))
    assert all(link["href"][1:] in identities for link in page.all("a"))
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in page.all("svg"))
    assert all(header.get("scope") for header in page.all("th"))
