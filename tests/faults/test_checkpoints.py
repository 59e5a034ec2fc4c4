"""Short forms of `python -m tests.faults.checkpoints`."""

from __future__ import annotations

import pytest

from tests.faults.checkpoints import damages, file_too_large, full_disk, kills, small_disk


def test_a_killed_save_leaves_a_loadable_checkpoint(tmp_path):
    counts = kills(10, 1, tmp_path)
    assert {counts[name] for name in ("kills", "loadable", "whole", "nothing promised was lost")} == {10}, counts


def test_every_damage_is_refused_by_name_and_the_previous_one_taken(tmp_path):
    for name, (done, refused, taken) in damages(12, 2, tmp_path).items():
        assert done == refused == taken, name


def test_a_full_disk_costs_one_save_and_no_checkpoint():
    with small_disk(20_000_000) as disk:
        if disk is None:
            pytest.skip("this process may not mount a tmpfs")
        counts = full_disk(6, 3, disk)
    assert counts["failed saves"] >= 2
    assert {count for name, count in counts.items() if name != "failed saves"} == {6}, counts


def test_a_write_that_fails_in_the_middle_of_a_file_costs_no_checkpoint(tmp_path):
    assert set(file_too_large(tmp_path).values()) == {3}
