"""The before/after report: what counts as lost and gained, its verdict, and the page."""

from __future__ import annotations

import json
import math

import pytest

from mmpretrain import InputError
from mmpretrain.cli import main
from mmpretrain.forgetting import compare, read_metrics

BEFORE = {
    "old/recall@1": 0.60, "old/recall@1/chance": 0.01, "old/recall@1/ci_low": 0.55, "old/recall@1/ci_high": 0.65,
    "old/images": 100.0, "new/top1": 0.20, "new/top1/chance": 0.1, "new/top1/ci_low": 0.15, "new/top1/ci_high": 0.25,
}  # fmt: skip


def after(old: float, new: float) -> dict[str, float]:
    values = {"old/recall@1": old, "new/top1": new}
    ends = {f"{k}/ci_{end}": v + width for k, v in values.items() for end, width in (("low", -0.05), ("high", 0.05))}
    return {**BEFORE, **values, **ends}


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (0.60, 0.50, "learned and kept"),
        (0.58, 0.50, "learned and kept"),  # inside the interval
        (0.50, 0.50, "learned, but forgot"),
        (0.60, 0.22, "kept, but learned nothing"),
        (0.10, 0.10, "forgot, and learned nothing"),
        (math.nan, 0.50, "learned, but forgot"),
    ],
)
def test_verdicts(old, new, verdict):
    found = compare("x", BEFORE, after(old, new), ["old"], ["new"])
    assert found.verdict == verdict
    assert [(c.metric, c.task) for c in found.changes] == [("old/recall@1", "old"), ("new/top1", "target")]


def test_without_intervals_the_limit_decides():
    before, now = {"old/score": 0.5}, {"old/score": 0.48}
    assert compare("x", before, now, ["old/score"], [], limit=0.03).verdict == "learned and kept"
    assert compare("x", before, now, ["old/score"], [], limit=0.01).verdict == "learned, but forgot"


def test_metrics_that_one_side_lacks_are_named():
    with pytest.raises(InputError, match="no metric 'other'"):
        compare("x", BEFORE, BEFORE, ["other"], [])
    with pytest.raises(InputError, match="missing after"):
        compare("x", BEFORE, {}, ["old"], [])


def test_the_command_compares_several_models_and_writes_numbers_and_a_page(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    files = {
        "before.json": BEFORE,
        "naive.json": after(0.10, 0.90),
        "run/metrics.json": {f"val/{k}": None if v != v else v for k, v in after(0.59, 0.80).items()},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    paths = [str(tmp_path / name) for name in ("before.json", "naive.json", "run")]
    outputs = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "deep" / "out.html")]
    assert main(["forgetting", *paths, "--old", "old", "--target", "new/top1", *outputs, "--strict"]) == 1
    assert "learned, but forgot" in capsys.readouterr().out
    naive, safe = json.loads((tmp_path / "out.json").read_text())
    assert naive["verdict"] == "learned, but forgot" and safe["verdict"] == "learned and kept"
    assert naive["mean_change_old"] == pytest.approx(-0.5)
    page = (tmp_path / "deep" / "out.html").read_text()
    assert "learned, but forgot" in page and "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert main(["forgetting", paths[0], paths[2], "--old", "old", "--strict"]) == 0


def test_files_that_hold_no_metrics_are_named(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="holds no metrics"):
        read_metrics(tmp_path / "list.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_metrics(tmp_path / "none.json")


def test_a_benchmark_of_one_model_is_read_and_of_several_refused(tmp_path):
    model = {"name": "m", "metrics": {"pets/zero_shot/top1": 0.5}}
    for number in (1, 2):
        (tmp_path / f"{number}.json").write_text(json.dumps({"format": 1, "models": [model] * number}))
    assert read_metrics(tmp_path / "1.json") == model["metrics"]
    with pytest.raises(InputError, match="metrics of 2 models"):
        read_metrics(tmp_path / "2.json")


@pytest.mark.parametrize("limit", ["-1", "nan"])
def test_a_limit_that_everything_exceeds_is_refused(tmp_path, capsys, limit):
    (tmp_path / "m.json").write_text(json.dumps(BEFORE))
    assert (
        main(["forgetting", str(tmp_path / "m.json"), str(tmp_path / "m.json"), "--old=old", f"--limit={limit}"]) == 2
    )
    assert "--limit" in capsys.readouterr().err
