"""The order of samples: a permutation per epoch, a pure function of seed and step, in windows of shards."""

import itertools
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmpretrain.data.order import Order, Position
from mmpretrain.errors import InputError

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=8)


def orders(draw_shuffle: bool | None = None) -> st.SearchStrategy[tuple[list[int], Order]]:
    @st.composite
    def build(draw: st.DrawFn) -> tuple[list[int], Order]:
        sizes = draw(SIZES.filter(lambda sizes: sum(sizes) > 0))
        batch = draw(st.integers(1, sum(sizes)))
        shuffle = draw(st.booleans()) if draw_shuffle is None else draw_shuffle
        seed = draw(st.integers(0, 2**70))
        return sizes, Order(sizes, batch, seed, shuffle=shuffle, window=draw(st.integers(1, 10)))

    return build()


def epoch_of(order: Order, number: int) -> list[int]:
    steps = range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch)
    positions = [position for step in steps for position in order.batch(step)]
    assert {position.epoch for position in positions} == {number}
    return [position.index for position in positions]


@given(orders(), st.integers(0, 3))
def test_an_epoch_is_a_permutation_without_the_remainder(case: tuple[list[int], Order], number: int) -> None:
    sizes, order = case
    seen = epoch_of(order, number)
    batch = len(order.batch(0))
    assert order.steps_per_epoch == sum(sizes) // batch
    assert len(seen) == len(set(seen)) == sum(sizes) - sum(sizes) % batch
    assert set(seen) <= set(range(sum(sizes)))


@given(orders(), st.lists(st.integers(0, 40), max_size=12), st.integers(0, 40))
def test_a_batch_depends_on_nothing_asked_before(case: tuple[list[int], Order], before: list[int], step: int) -> None:
    _, order = case
    expected = pickle.loads(pickle.dumps(order)).batch(step)
    for other in before:
        order.batch(other)
    assert order.batch(step) == expected


@given(SIZES, st.integers(1, 4), st.integers(1, 3), st.integers(0, 9), st.integers(0, 5))
def test_the_ranks_slices_make_up_the_same_batch_for_any_world_size(
    sizes: list[int], world_size: int, per_rank: int, seed: int, step: int
) -> None:
    assume(sum(sizes) >= world_size * per_rank)
    size = world_size * per_rank
    ranks = [
        Order(sizes, size, seed).batch(step)[rank * per_rank : (rank + 1) * per_rank] for rank in range(world_size)
    ]
    assert list(itertools.chain(*ranks)) == Order(sizes, size, seed).batch(step)
    assert len({position for rank in ranks for position in rank}) == size


@given(orders(draw_shuffle=False), st.integers(0, 2))
def test_without_shuffle_the_order_is_sequential(case: tuple[list[int], Order], number: int) -> None:
    seen = epoch_of(case[1], number)
    assert seen == list(range(len(seen)))


@given(orders(draw_shuffle=True), st.integers(0, 2))
def test_samples_stay_inside_their_window_of_shards(case: tuple[list[int], Order], number: int) -> None:
    sizes, order = case
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    first_seen: dict[int, int] = {}
    last_seen: dict[int, int] = {}
    for place, index in enumerate(epoch_of(order, number)):
        first_seen.setdefault(int(shard_of[index]), place)
        last_seen[int(shard_of[index])] = place
    for place in range(order.steps_per_epoch * len(order.batch(0))):
        open_shards = [shard for shard in first_seen if first_seen[shard] <= place <= last_seen[shard]]
        assert len(open_shards) <= order._window


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    sizes = [50] * 20
    same = [epoch_of(Order(sizes, 100, 7, window=4), 0) for _ in range(2)]
    assert same[0] == same[1]
    others = [
        epoch_of(Order(sizes, 100, 8, window=4), 0),
        epoch_of(Order(sizes, 100, 7 + 2**32, window=4), 0),
        epoch_of(Order(sizes, 100, 7, window=4), 1),
    ]
    assert all(other != same[0] for other in others)
    assert len({tuple(other) for other in others}) == 3


def test_the_batch_size_does_not_change_the_stream_of_samples() -> None:
    sizes = [10, 30, 20, 4]
    assert epoch_of(Order(sizes, 8, 3, window=2), 2) == epoch_of(Order(sizes, 32, 3, window=2), 2)


def test_the_order_is_the_same_in_every_version() -> None:
    # A change here breaks the continuation of every run that was started before it.
    order = Order([3, 5, 2, 4], 7, seed=1, window=2)
    assert [position.index for step in range(2) for position in order.batch(step)] == [
        8,
        13,
        11,
        12,
        9,
        10,
        2,
        5,
        6,
        1,
        7,
        4,
        0,
        3,
    ]
    assert order.batch(2)[0] == Position(1, 7)


def test_samples_are_mixed_well_inside_a_window() -> None:
    # Mean place of each sample over 400 epochs: the middle, within five standard errors.
    order = Order([10] * 5, 50, seed=0, window=5)
    places = np.array([np.argsort([p.index for p in order.batch(step)]) for step in range(400)])
    error = np.sqrt((50**2 - 1) / 12 / 400)
    assert np.abs(places.mean(0) - 24.5).max() < 5 * error


def test_memory_is_that_of_shards_and_one_window() -> None:
    tracemalloc.start()
    try:
        order = Order([10_000] * 10_000, 4096, seed=0, window=4)  # 100 million samples
        for step in (0, 12_345, 24_000, 10**6):
            order.batch(step)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("sizes", "batch", "seed", "window", "says"),
    [
        ([3, 4], 8, 0, 2, "7 samples in 2 shards cannot fill a global batch of 8"),
        ([], 1, 0, 2, "0 samples in 0 shards"),
        ([3], 0, 0, 2, "global_batch_size is 0"),
        ([3], 1, -1, 2, "seed is -1"),
        ([3], 1, 0, 0, "window is 0"),
        ([3, -1], 1, 0, 1, "shard_sizes holds -1"),
    ],
)
def test_bad_numbers_are_refused(sizes: list[int], batch: int, seed: int, window: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Order(sizes, batch, seed, window=window)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(InputError, match="step is -1"):
        Order([3], 1, 0).batch(-1)
