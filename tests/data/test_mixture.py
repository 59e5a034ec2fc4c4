"""Mixtures: constant shares of every batch, spread so that ranks have theirs, each part with its own epochs."""

import pickle
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpretrain.data.mixture import Mixture, shares
from mmpretrain.data.order import Position
from mmpretrain.errors import InputError

PARTS = {"a": [20] * 10, "b": [7, 0, 30], "c": [25, 25]}
STARTS = {"a": 0, "b": 200, "c": 237}


def part_of(position: Position) -> str:
    return max((start, name) for name, start in STARTS.items() if start <= position.index)[1]


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.5, 20), min_size=1), st.integers(200, 5000))
def test_shares_are_the_weights_to_within_a_row(weights: dict[str, float], batch: int) -> None:
    counts = shares(weights, list(weights), batch)
    assert sum(counts.values()) == batch
    for name, weight in weights.items():
        assert abs(counts[name] - batch * weight / sum(weights.values())) < 1
    doubled = {name: 2 * weight for name, weight in weights.items()}
    assert shares(doubled, list(weights), batch) == counts


def test_equal_remainders_go_to_the_part_named_first() -> None:
    assert shares({"a": 1, "b": 1, "c": 1}, ["c", "a", "b"], 4) == {"c": 2, "a": 1, "b": 1}


def test_without_weights_parts_count_by_their_samples() -> None:
    assert Mixture(PARTS, None, 287 // 7, 0).counts == shares({"a": 200, "b": 37, "c": 50}, ["a", "b", "c"], 41)


@given(st.integers(0, 60), st.integers(0, 9))
def test_every_batch_has_the_same_shares_and_ranks_have_theirs(step: int, seed: int) -> None:
    mixture = Mixture(PARTS, {"a": 2, "b": 1, "c": 1}, 32, seed)
    batch = mixture.batch(step)
    assert Counter(map(part_of, batch)) == {"a": 16, "b": 8, "c": 8}
    for world_size in (2, 4, 8):
        rows = 32 // world_size
        for rank in range(world_size):
            held = Counter(map(part_of, batch[rank * rows : (rank + 1) * rows]))
            for part, count in mixture.counts.items():
                assert abs(held[part] - count / world_size) <= 1


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.data())
def test_any_rows_hold_their_share_of_each_part_to_within_a_row(counts: list[int], data: st.DataObject) -> None:
    names = [str(i) for i in range(len(counts))]
    batch = sum(counts)
    mixture = Mixture({n: [c] for n, c in zip(names, counts)}, dict(zip(names, counts)), batch, 0)
    start = data.draw(st.integers(0, batch))
    _, ranges = mixture._ranges(0, 0, start)
    for (_, stop), count in zip(ranges, counts):
        assert abs(stop - count * start / batch) <= 0.5 + len(counts) / 2


@given(st.integers(0, 80), st.lists(st.integers(0, 80), max_size=5), st.data())
def test_rows_and_their_shards_depend_on_nothing_asked_before(
    step: int, before: list[int], data: st.DataObject
) -> None:
    mixture = Mixture(PARTS, {"a": 3, "b": 1, "c": 1}, 20, 5, window=2)
    whole = pickle.loads(pickle.dumps(mixture)).batch(step)
    for other in before:
        mixture.batch(other)
    start = data.draw(st.integers(0, 20))
    stop = data.draw(st.integers(start, 20))
    assert mixture.batch(step, start, stop) == whole[start:stop]
    sizes = [size for sizes in PARTS.values() for size in sizes]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    lie_in = {next(i for i, end in enumerate(ends) if position.index < end) for position in whole[start:stop]}
    assert mixture.shards(step, start, stop) == sorted(lie_in)


def test_each_part_has_epochs_of_its_own() -> None:
    mixture = Mixture(PARTS, {"a": 2, "b": 1, "c": 1}, 20, 1)
    assert mixture.counts == {"a": 10, "b": 5, "c": 5}
    drawn = [position for step in range(40) for position in mixture.batch(step)]
    for part, total, rows in (("a", 200, 10), ("b", 37, 5), ("c", 50, 5)):
        epochs: dict[int, list[int]] = {}
        for position in drawn:
            if part_of(position) == part:
                epochs.setdefault(position.epoch, []).append(position.index - STARTS[part])
        assert list(epochs) == sorted(epochs)
        for seen in list(epochs.values())[:-1]:
            assert len(seen) == len(set(seen)) == total // rows * rows
    assert {position.epoch for position in drawn if part_of(position) == "a"} == {0, 1}


def test_parts_of_the_same_sizes_are_walked_differently_and_the_seed_counts() -> None:
    same = {"a": [50] * 2, "b": [50] * 2}
    batch = Mixture(same, None, 40, 0).batch(0)
    a, b = ([p.index % 100 for p in batch if p.index // 100 == part] for part in (0, 1))
    assert a != b
    assert Mixture(same, None, 40, 1).batch(0) != batch


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a": 1, "b": 1}, r"weights name \['a', 'b'\], the parts are \['a', 'b', 'c'\]"),
        ({"a": 1, "b": 1, "c": 0}, "the weight of 'c' is 0"),
        ({"a": 1, "b": 1, "c": float("nan")}, "the weight of 'c' is nan"),
        ({"a": 1, "b": "x", "c": 1}, "the weight of 'b' is 'x'; give a number"),
        ({"a": 1, "b": 1, "c": None}, "the weight of 'c' is None; give a number"),
        ({"a": 1, "b": True, "c": 1}, "the weight of 'b' is True; give a number"),
        ({"a": 100, "b": 100, "c": 1}, "part 'c' of weight 1 .of 201. gets no row of a global batch of 40"),
        ({"a": 1, "b": 38, "c": 1}, "part 'b' of a mixture: 37 samples in 3 shards cannot fill a global batch of 38"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Mixture(PARTS, weights, 40, 0)
