"""Every benchmark answers --help and knows --json; the set goes on where one fails; the README's table was measured."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as whole
from benchmarks import _harness as harness

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py") if "\ndef main(" in path.read_text())


def test_the_set_is_of_benchmarks_that_exist():
    assert {*whole.SET, *whole.OTHERS} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_help_and_json(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--json" in printed
    assert (module.__doc__ or "").splitlines()[0] in printed


def result(name: str) -> dict:
    row = harness.Row(f"row of {name}", "samples/s", [300.0], [100.0], "peer", target=2.5)
    return harness.Report(name, [row], {"loss": 0.0}, ["torch"], {"rounds": 1}).as_json()


def test_one_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(whole, "measure", lambda name, _: "it broke" if name == "loader" else result(name))
    status = whole.main(["--out", str(tmp_path), "--only", "image_path", "--only", "loader", "--only", "accumulation"])
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    assert status == 1
    assert "**loader** gave no result: it broke." in text
    assert "| `accumulation` | row of accumulation | 300 samples/s | 100 samples/s (peer) | **3x** | 2.5x |" in text
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+-cores-image_path-loader-accumulation\.md", page.name)
    assert "loader gave no result" in capsys.readouterr().err


def test_a_process_that_ends_badly_or_prints_no_json_gives_no_result(monkeypatch, tmp_path):
    monkeypatch.setattr(whole.sys, "executable", sys.executable)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    for name, line in {"bad": "raise SystemExit(3)", "chatty": "print('hello')", "fine": "print('{}')"}.items():
        (tmp_path / "benchmarks" / f"{name}.py").write_text(line)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "ended with 3" in whole.measure("bad", [])
    assert "one JSON object" in whole.measure("chatty", [])
    assert whole.measure("fine", []) == {}


def test_the_table_of_the_readme_is_that_of_a_results_file():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"<!-- bench: (\S+) -->\n(.*?)\n(?=\n|$)", text, re.DOTALL)
    assert named, "README.md has no table of benchmarks: put `<!-- bench: FILE -->` above it"
    for file, table in named:
        measured = (ROOT / "benchmarks" / "results" / file).read_text().splitlines()
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert rows, f"no table follows the marker of {file}"
        assert [line for line in rows if line not in measured] == []


def test_a_results_file_holds_the_summary_of_its_json():
    lines = whole.page({"image_path": result("image_path")}, {}, "python -m benchmarks").splitlines()
    assert set(whole.summary({"image_path": json.loads(json.dumps(result("image_path")))})) <= set(lines)
