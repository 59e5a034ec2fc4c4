"""The parity report: what it says, and what it refuses."""

from __future__ import annotations

import json
import math
from importlib.metadata import version

import pytest
import torch

from mmpretrain import InputError
from mmpretrain.interop.out_folder import new_folder
from mmpretrain.interop.parity import check, max_abs_error

INPUTS = {"seed": 0, "shapes": {"image": [2, 3, 16, 16]}}


def test_report_says_what_was_compared(tmp_path):
    ours = torch.arange(6.0).view(2, 3)
    found = check({"image": (ours + 2.0**-20, ours), "text": (ours, ours)}, 1e-5, INPUTS, "onnx", ["timm", "none"])
    assert found.errors == {"image": 2.0**-20, "text": 0.0} and found.largest == 2.0**-20
    written = json.loads(found.write(tmp_path).read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["parity.json"]
    assert written["errors"] == found.errors and written["largest"] == found.largest
    assert written["inputs"] == INPUTS and written["tolerance"] == 1e-5 and written["target"] == "onnx"
    assert written["versions"]["timm"] == version("timm") and "none" not in written["versions"]
    assert {"torch", "mmpretrain-contrastive"} <= set(written["versions"])


def test_an_error_as_large_as_the_tolerance_passes_and_a_larger_one_does_not():
    zero, step = torch.zeros(3, dtype=torch.float64), torch.full((3,), 0.25, dtype=torch.float64)
    assert check({"x": (step, zero)}, 0.25, {}, "onnx").largest == 0.25
    with pytest.raises(InputError, match=r"onnx: 1 of 2 outputs differ by more than 0\.2: text by 2\.50e-01"):
        check({"image": (zero, zero), "text": (step, zero)}, 0.2, {}, "onnx")


def test_halves_of_large_numbers_are_compared_exactly():
    ours = torch.tensor([2**24], dtype=torch.int64)
    assert max_abs_error(ours + 1, ours) == 1.0
    assert max_abs_error(torch.empty(0, 3), torch.empty(0, 3)) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_never_pass(value):
    with pytest.raises(InputError, match="image has values that are not finite"):
        check({"image": (torch.tensor([1.0, value]), torch.ones(2))}, 1e9, {}, "timm")


def test_other_shapes_and_nothing_at_all_are_refused():
    with pytest.raises(InputError, match=r"image has shape \(2, 3\) instead of \(3, 2\)"):
        check({"image": (torch.zeros(2, 3), torch.zeros(3, 2))}, 1.0, {}, "timm")
    with pytest.raises(InputError, match="no output was compared"):
        check({}, 1.0, {}, "timm")


def test_many_wrong_outputs_are_counted_not_listed():
    outputs = {f"output {i}": (torch.ones(1), torch.zeros(1)) for i in range(9)}
    with pytest.raises(InputError, match=r"9 of 9 outputs.*and 3 more"):
        check(outputs, 0.5, {}, "onnx")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "export"
    with pytest.raises(RuntimeError), new_folder(out) as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert list(out.parent.iterdir()) == []
    for content in ("first", "second"):  # an earlier export is replaced
        with new_folder(out) as folder:
            (folder / "parity.json").write_text("{}")
            (folder / content).touch()
        assert {path.name for path in out.iterdir()} == {"parity.json", content}
    assert list(out.parent.iterdir()) == [out]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="is no earlier export"), new_folder(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years"
