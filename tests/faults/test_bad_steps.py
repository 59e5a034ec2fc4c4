"""A few trials of `python -m tests.faults.bad_steps`, and what it cannot draw by chance."""

from __future__ import annotations

from tests.faults.bad_steps import compare, compare_sharded, main
from tests.ranks import run_ranks


def both() -> list[str]:
    """The gradient of rank 1 alone is spoilt, after the ranks averaged theirs: only the agreement saves rank 0."""
    return compare_sharded(1) + compare("gradient", "adamw_fused", frozenset({1, 3}), 1, 5)


def test_two_ranks_skip_together_with_and_without_sharding():
    assert run_ranks(both, 2) == [[], []]


def test_random_trials_hold(capsys):
    assert main(["--trials", "4", "--seed", "1"]) == 0
    assert "equal bit for bit" in capsys.readouterr().out
