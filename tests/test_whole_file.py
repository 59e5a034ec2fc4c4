"""A file is replaced as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmpretrain.whole_file import replaced, write_whole


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    target = tmp_path / "a.json"
    write_whole(target, "old")
    with pytest.raises(OSError, match="disk"), replaced(target) as temporary:
        temporary.write_text("ne")
        raise OSError("disk full")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_the_folder_is_made_and_lone_surrogates_are_no_reason_to_fail(tmp_path: Path):
    write_whole(tmp_path / "new" / "a.txt", "caf\u00e9 \ud800")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "caf\u00e9 ?".encode()


def test_files_are_as_readable_as_the_users_others(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a.txt", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
