"""The harness: which way a ratio points, the spread, refusing to measure what differs, and the one JSON object."""

from __future__ import annotations

import json

import pytest

from benchmarks import _harness as harness


def test_a_ratio_is_how_many_times_better_ours_is():
    rate = harness.Row("rate", "samples/s", [200.0, 300.0, 400.0], [100.0, 100.0, 100.0], "peer", target=2.5)
    time = harness.Row("time", "s", [1.0, 2.0, 4.0], [4.0, 4.0, 4.0], "peer", more_is_better=False, target=2.5)
    assert rate.ratios == [2.0, 3.0, 4.0]
    assert time.ratios == [4.0, 2.0, 1.0]
    assert (rate.as_json()["ratio"], rate.as_json()["spread"], rate.as_json()["met"]) == (3.0, [2.0, 4.0], True)
    assert (time.as_json()["ratio"], time.as_json()["spread"], time.as_json()["met"]) == (2.0, [1.0, 4.0], False)
    assert harness.Row("none", "s", [1.0], [1.0], "peer").as_json()["met"] is None


def test_a_ratio_is_the_median_of_rounds_not_the_ratio_of_medians():
    row = harness.Row("rate", "samples/s", [1.0, 2.0, 9.0], [1.0, 4.0, 3.0], "peer")
    assert row.ratio == 1.0  # of 1, 0.5 and 3


def test_rounds_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        _ = harness.Row("rate", "s", [1.0, 2.0], [1.0], "peer").ratios


def test_sides_that_differ_are_not_measured():
    assert harness.check({"loss": (1e-6, 1e-5)}) == {"loss": 1e-6}
    with pytest.raises(SystemExit, match=r"not compute the same: loss 0\.1, allowed 1e-05"):
        harness.check({"pixels": (0, 1), "loss": (0.1, 1e-5)})
    with pytest.raises(SystemExit, match="not compute the same"):
        harness.check({"loss": (float("nan"), 1e-5)})


def test_sides_alternate_and_the_warm_up_does_not_count():
    called: list[str] = []

    def side(name: str) -> float:
        called.append(name)
        return float(len(called))

    found = harness.alternate({name: lambda name=name: side(name) for name in ("ours", "peer")}, rounds=3, warm_up=1)
    assert {name: len(values) for name, values in found.items()} == {"ours": 3, "peer": 3}
    assert all({called[i], called[i + 1]} == {"ours", "peer"} for i in range(0, 8, 2))
    assert len({tuple(called[i : i + 2]) for i in range(0, 8, 2)}) == 2  # neither is always the first


def test_json_is_one_object_and_the_table_has_its_rows(capsys):
    row = harness.Row("a row", "s", [1.0, 1.0], [2.0, 2.0], "peer", more_is_better=False, target=3.0)
    report = harness.Report("name", [row], {"loss": 0.0}, ["torch"], {"batch": 2}, ["A note."])
    harness.finish(report, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["benchmark"] == "name"
    assert found["rows"][0]["ratio"] == 2.0
    assert set(found["machine"]) >= {"device", "cores", "threads"}
    harness.finish(report, as_json=False)
    printed = capsys.readouterr().out
    assert printed.strip() == harness.markdown(found)
    assert "**2x** (2 to 2) | 3 (missed) |" in printed
    assert "A note." in printed
