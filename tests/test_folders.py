"""A folder that cannot take another's place leaves the other one as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmpretrain.errors import InputError
from mmpretrain.folders import others, put_in_place


@pytest.fixture
def folders(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    return tmp_path / "new", tmp_path / "old"


def refuse(monkeypatch, *names):
    rename = Path.rename

    def failing(self, target):
        if self.name in names:
            raise OSError(18, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)


def test_the_new_folder_replaces_the_old_one_or_a_link_to_one(folders):
    new, old = folders
    link = old.with_name("link")
    link.symlink_to(old)
    put_in_place(new, link)
    assert (link / "x").read_text() == "new" and not link.is_symlink()
    put_in_place(link, old)
    assert (old / "x").read_text() == "new"
    assert [path.name for path in old.parent.iterdir()] == ["old"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_renamed(folders, monkeypatch):
    new, old = folders
    refuse(monkeypatch, "new")
    with pytest.raises(InputError, match=r"cannot be written: .*cross-device link; what was there is as it was"):
        put_in_place(new, old)
    assert (old / "x").read_text() == "old"


def test_where_the_old_folder_is_gets_said_when_it_cannot_come_back(folders, monkeypatch):
    new, old = folders
    refuse(monkeypatch, "new", "new.old")
    with pytest.raises(InputError, match=r"what was there is now .*new\.old"):
        put_in_place(new, old)
    assert (new.with_name("new.old") / "x").read_text() == "old"


def test_what_else_a_folder_holds_is_listed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    (tmp_path / "c").mkdir()
    assert others(tmp_path, {"a/b"}) == ["c"]
    assert others(tmp_path, {"a/b", "c"}) == ["c"]  # a folder where a file should be
    assert others(tmp_path, {"c"}) == ["a", "a/b", "c"]
