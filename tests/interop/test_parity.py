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


def test_notes_are_written_and_said_and_not_held_against_the_tolerance(tmp_path):
    same = {"x": (torch.zeros(1), torch.zeros(1))}
    found = check(same, 1e-5, {}, "open_clip", notes={"turned": 2.5, "grey": 0.0})
    assert json.loads(found.write(tmp_path).read_text())["notes"] == {"turned": 2.5, "grey": 0.0}
    assert found.largest == 0
    assert found.said == (
        "open_clip reads some files otherwise than this model: turned differ by up to 2.5 (normalised)"
    )
    assert not check(same, 1e-5, {}, "open_clip", notes={"grey": 0.0}).said


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


def written(folder, target):
    check({"x": (torch.zeros(1), torch.zeros(1))}, 1.0, {}, target).write(folder)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "export"
    with pytest.raises(RuntimeError), new_folder(out, "timm") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert list(out.parent.iterdir()) == []
    for content in ("first", "second"):  # an earlier export is replaced
        with new_folder(out, "timm") as folder:
            written(folder, "timm")
            (folder / content).touch()
        assert {path.name for path in out.iterdir()} == {"parity.json", content}
    assert list(out.parent.iterdir()) == [out]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="is no earlier export"), new_folder(tmp_path, "timm"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years"


@pytest.fixture
def exported(tmp_path):
    with new_folder(tmp_path / "out", "timm") as folder:
        written(folder, "timm")
        (folder / "weights").mkdir()
        (folder / "weights" / "a").write_text("first")
    return tmp_path / "out"


def replace(out, target):
    with new_folder(out, target) as folder:
        written(folder, target)
        (folder / "b").write_text("second")


def test_only_what_an_export_for_the_same_target_wrote_is_replaced(exported):
    with pytest.raises(InputError, match="is an export for timm, not for onnx"):
        replace(exported, "onnx")
    for name in ("notes.txt", "weights/mine"):
        (exported / name).write_text("years")
        with pytest.raises(InputError, match=f"holds {name}, which no export wrote"):
            replace(exported, "timm")
        assert (exported / name).read_text() == "years"
        (exported / name).unlink()
    replace(exported, "timm")
    assert {path.name for path in exported.iterdir()} == {"parity.json", "b"}


def test_a_file_that_came_during_the_export_is_kept(exported):
    with pytest.raises(InputError, match=r"holds late\.txt"), new_folder(exported, "timm") as folder:
        written(folder, "timm")
        (exported / "late.txt").write_text("kept")
    assert (exported / "late.txt").read_text() == "kept"
    assert [path.name for path in exported.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("report", ["{}", "[]", "no json", '{"target": "timm"}', '{"target": "timm", "files": 3}'])
def test_a_report_without_a_list_of_files_allows_nothing(report, exported):
    (exported / "parity.json").write_text(report)
    with pytest.raises(InputError, match="does not list the files of an earlier export"):
        replace(exported, "timm")
    assert (exported / "weights" / "a").read_text() == "first"
