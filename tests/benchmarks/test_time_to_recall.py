"""What the clock and the recall are read from, on curves and embeddings made up for it."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.time_to_recall import Point, compared_at, plan, reached, recall


def test_recall_is_the_share_of_captions_nearest_to_their_own_picture():
    pictures = torch.eye(4)
    assert recall(pictures, pictures * 3) == 1.0
    assert recall(pictures, pictures[[1, 0, 2, 3]]) == 0.5
    assert recall(torch.ones(4, 4), torch.ones(4, 4)) == 0.0  # all alike: nothing was found


def test_the_time_is_that_of_the_first_checkpoint_that_is_as_good():
    points = [Point(10, 0.1), Point(20, 0.3), Point(30, 0.2), Point(40, 0.5)]
    assert reached(points, 0.3) == 20
    assert reached(points, 0.31) == 40


def test_curves_are_compared_at_the_peers_last_recall_or_where_ours_ends() -> None:
    ours = [Point(10, 0.1), Point(20, 0.5)]
    assert compared_at(ours, [Point(5, 0.6), Point(80, 0.4)]) == (0.4, "open_clip's last")
    level, which = compared_at(ours, [Point(40, 0.3), Point(80, 0.6)])
    assert level == 0.5 and "never reached" in which and "60.0%" in which


def test_as_many_epochs_as_fit_behind_the_start():
    timed = [(20.0, Path("epoch_1.pt")), (30.0, Path("epoch_2.pt"))]  # 10 s to start, 10 s an epoch
    assert plan(60, timed) == 5
    assert plan(5, timed) == 1
