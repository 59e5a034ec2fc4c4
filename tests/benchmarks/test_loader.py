"""Both sides of the loader benchmark are held against each other, and made-up pictures are pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks import _harness as harness
from benchmarks import _pictures
from benchmarks.loader import COMPARED, COUNT, compare


def save(folder, side: str, change: int = 0, leave_out: int = 0) -> None:
    names = [f"1 {i}" for i in range(COUNT - leave_out)]
    pixels = {name: np.full((3, 2, 2), 100, np.uint8) for name in names[:COMPARED]}
    pixels["1 7"][0, 0, 0] += change
    np.savez(folder / f"{side}.npz", names=names, **pixels)


@pytest.mark.parametrize(
    ("change", "leave_out", "refused"), [(0, 0, None), (2, 0, None), (3, 0, "levels"), (0, 1, "captions")]
)
def test_epochs_that_differ_are_refused(tmp_path, change, leave_out, refused):
    save(tmp_path, "ours", change, leave_out)
    save(tmp_path, "peer")
    files = {side: tmp_path / f"{side}.npz" for side in ("ours", "peer")}
    if refused is None:
        assert harness.check(compare(files))["largest difference of a pixel, in levels"] == change
        return
    with pytest.raises(SystemExit, match=refused):
        harness.check(compare(files))


def test_pictures_are_the_same_each_time_and_no_two_are_alike():
    made = [_pictures.picture(i, (64, 48)) for i in (0, 1)]
    assert made[0] == _pictures.picture(0, (64, 48)) != made[1]
    with Image.open(io.BytesIO(made[0])) as opened:
        assert sorted(opened.size) == [48, 64]
    assert _pictures.caption(1) != _pictures.caption(2)
