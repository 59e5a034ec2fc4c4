"""`mmpretrain export` finds the exporter of a format and says what was compared."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmpretrain import export_cli
from mmpretrain.cli import main
from mmpretrain.interop.parity import Parity


@pytest.mark.parametrize("format", export_cli.EXPORTERS)
def test_every_format_has_an_exporter(format):
    folder = Path(export_cli.__file__).parent / "interop"
    assert "\ndef export(" in (folder / f"{format}_out.py").read_text(encoding="utf-8")


def test_the_report_is_shown(monkeypatch, tmp_path, capsys):
    calls = []

    def export(folder, out, tolerance):
        calls.append((folder, out, tolerance))
        return Parity("timm", {"image.embedding": 3e-7}, tolerance, {}, {})

    for name in ("model.safetensors", "config.yaml"):
        (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, "mmpretrain.interop.timm_out", SimpleNamespace(export=export))
    assert main(["export", "timm", str(tmp_path), "out", "--tolerance", "1e-4"]) == 0
    assert calls == [(tmp_path, Path("out"), 1e-4)]
    shown = capsys.readouterr().out
    assert "image.embedding: max abs error 3.0e-07" in shown
    assert "parity.json" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["caffe", "model", "out"],
            "no format 'caffe'; expected one of open_clip, huggingface, timm, onnx, ",
        ),
        (["timm", "model", "out", "--tolerance", "0"], "expected a positive number"),
        (["timm", "model", "out", "--tolerance", "inf"], "tolerance is inf; expected a positive number"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(arguments, said, capsys):
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
