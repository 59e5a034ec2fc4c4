"""`mmpretrain export` finds the exporter of a format and says what was compared."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmpretrain import Encoded, export_cli, save
from mmpretrain.cli import main
from mmpretrain.config import instantiate
from mmpretrain.interop.parity import Parity


@pytest.mark.parametrize("format", export_cli.EXPORTERS)
def test_every_format_has_an_exporter(format):
    folder = Path(export_cli.__file__).parent / "interop"
    assert "\ndef export(" in (folder / f"{format}_out.py").read_text(encoding="utf-8")


def test_the_report_is_shown(monkeypatch, tmp_path, capsys):
    calls = []

    def export(folder, out, tolerance, allow):
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


class Corner(nn.Module):
    """An encoder of one's own: the corner of a picture."""

    width = 12

    def forward(self, values, mask=None):
        tokens = values[..., :2, :2].float().flatten(1)[:, None] / 255
        return Encoded(tokens[:, 0], tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool))


def test_an_encoder_of_a_package_that_is_allowed_is_exported(tmp_path, capsys):
    config = {
        "model": {
            "_target_": "mmpretrain.MultimodalModel",
            "embed_dim": 4,
            "encoders": {"image": {"_target_": f"{__name__}.Corner"}},
        },
        "preprocess": {"_target_": "mmpretrain.data.preprocess.Preprocess", "image_size": 16},
        "tokenizer": {"_target_": "mmpretrain.data.tokenizer.ByteTokenizer"},
    }
    folder = save(tmp_path / "model", instantiate(config["model"], allow=("tests",)), config)
    command = ["export", "torch_export", str(folder), str(tmp_path / "out")]
    assert main(command) == 2
    assert "which is not allowed" in capsys.readouterr().err
    assert main([*command, "--allow", "tests"]) == 0
    assert (tmp_path / "out" / "image.pt2").is_file()


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
