"""The short form of tests.faults.mutations: few trials of every kind of damage."""

from pathlib import Path

import pytest

from tests.faults.mutations import KINDS, Outcome, Row, failures, main, run, table


@pytest.mark.parametrize("kind", list(KINDS))
def test_other_samples_arrive_and_the_touched_are_counted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path / "cache"))
    row = run(kind, 10, 1, tmp_path)
    assert failures(kind, row) == []
    # Without damage the same words would hold.
    assert kind == "members swapped" or row.known["counted"] > 0
    assert row.webdataset["lost"] + row.webdataset["altered"] + row.webdataset["uncounted"] > 0
    assert f"| {kind} | {row.known['touched']} | {row.known['counted']} |" in table({kind: row})


def test_a_failure_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = Row(Outcome(), Outcome(), Outcome(), Outcome())
    row.known["lost"] = 2
    monkeypatch.setattr("tests.faults.mutations.run", lambda *_: row)
    assert main(["--trials", "1"]) == 1
    assert "truncated, known: 2 lost" in capsys.readouterr().out
