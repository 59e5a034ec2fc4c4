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
LARGE_SIZES = st.lists(st.integers(8, 12), min_size=16, max_size=24)


def orders(draw_shuffle: bool | None = None) -> st.SearchStrategy[tuple[list[int], Order]]:
    @st.composite
    def build(draw: st.DrawFn) -> tuple[list[int], Order]:
        sizes = draw(st.one_of(SIZES.filter(lambda sizes: sum(sizes) > 0), LARGE_SIZES))
        batch = draw(st.integers(1, sum(sizes)) if len(sizes) < 16 else st.sampled_from([32, 48, 64, 96]))
        shuffle = draw(st.booleans()) if draw_shuffle is None else draw_shuffle
        seed = draw(st.integers(0, 2**70))
        window, lanes = draw(st.integers(1, 10)), draw(st.integers(1, 10))
        return sizes, Order(sizes, batch, seed, shuffle=shuffle, window=window, lanes=lanes)

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


def simple_order(sizes: list[int], seed: int, window: int, epoch: int, lanes: int = 1) -> list[list[int]]:
    """The samples of each lane in one epoch, by the shortest way: `window` is the shards of one lane's window."""

    def shuffled(values: list[int], *stream: int) -> list[int]:
        words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch, *stream))).random_raw(len(values))
        return [values[i] for i in sorted(range(len(values)), key=lambda i: int(words[i]))]

    shards = shuffled(list(range(len(sizes))), 0)
    row = [(place, sum(sizes[:s]) + i) for place, s in enumerate(shards) for i in range(sizes[s])]
    pieces = [row[lane * len(row) // lanes : (lane + 1) * len(row) // lanes] for lane in range(lanes)]
    found: list[list[int]] = []
    for lane, piece in enumerate(pieces):
        first = piece[0][0] if lane else 0
        windows = itertools.groupby(piece, key=lambda item: (item[0] - first) // window)
        streams = [((number + 1, lane) if lane else (number + 1,), [i for _, i in items]) for number, items in windows]
        found.append([index for stream, samples in streams for index in shuffled(samples, *stream)])
    return found


@given(SIZES, st.integers(0, 2**70), st.integers(1, 10), st.integers(0, 2), st.data())
def test_one_lane_is_a_shuffle_in_windows_of_shards(
    sizes: list[int], seed: int, window: int, epoch: int, data: st.DataObject
) -> None:
    assume(sum(sizes) > 0)
    order = Order(sizes, data.draw(st.integers(1, sum(sizes))), seed, window=window, lanes=1)
    seen = epoch_of(order, epoch)
    (row,) = simple_order(sizes, seed, window, epoch)
    assert seen == row[: len(seen)]


@given(LARGE_SIZES, st.integers(1, 128), st.integers(1, 4), st.integers(1, 12))
def test_as_many_lanes_as_divide_the_batch_and_have_shards(
    sizes: list[int], batch: int, window: int, lanes: int
) -> None:
    possible = [n for n in range(1, lanes + 1) if batch % n == 0 and n * window <= len(sizes) and batch // n >= 16]
    assert Order(sizes, batch, 0, window=window, lanes=lanes).lanes == max([1, *possible])
    assert Order(sizes, batch, 0, shuffle=False, window=window, lanes=lanes).lanes == 1


def test_small_data_has_one_lane_and_is_shuffled_as_a_whole() -> None:
    assert Order([500] * 31, 4096, 0).lanes == 1
    assert Order([500] * 32, 4096, 0).lanes == 2
    assert Order([500] * 10_000, 4096, 0).lanes == 256
    assert Order([500] * 10_000, 3072, 0).lanes == 192
    assert Order([500] * 10_000, 256, 0).lanes == 16


LANED = st.tuples(LARGE_SIZES, st.sampled_from([64, 96, 128]), st.integers(0, 99))


@given(LANED, st.integers(0, 2), st.integers(1, 12))
def test_every_lane_walks_its_own_piece_of_the_shuffled_shards(
    case: tuple[list[int], int, int], epoch: int, window: int
) -> None:
    sizes, batch, seed = case
    order = Order(sizes, batch, seed, window=window, lanes=4)
    pieces = simple_order(sizes, seed, max(1, window // order.lanes), epoch, order.lanes)
    share = batch // order.lanes
    for step in range(order.steps_per_epoch):
        drawn = [p.index for p in order.batch(epoch * order.steps_per_epoch + step)]
        assert drawn == [i for piece in pieces for i in piece[step * share : (step + 1) * share]]


@given(orders(), st.integers(0, 40), st.data())
def test_rows_of_a_batch_and_the_shards_they_lie_in(
    case: tuple[list[int], Order], step: int, data: st.DataObject
) -> None:
    sizes, order = case
    whole = order.batch(step)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    alone = pickle.loads(pickle.dumps(order))
    assert alone.batch(step, start, stop) == whole[start:stop]
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    assert alone.shards(step, start, stop) == sorted({int(shard_of[p.index]) for p in whole[start:stop]})


@given(LANED, st.sampled_from([1, 2, 4]), st.integers(0, 30))
def test_a_rank_reads_only_the_shards_of_its_lanes(
    case: tuple[list[int], int, int], world_size: int, first_step: int
) -> None:
    sizes, batch, seed = case
    share = batch // world_size
    for rank in range(world_size):
        order = Order(sizes, batch, seed, window=4, lanes=4)
        for step in range(first_step, first_step + 3):
            pieces = simple_order(sizes, seed, 1, step // order.steps_per_epoch, 4)
            owned = itertools.chain(*pieces[4 * rank // world_size : 4 * (rank + 1) // world_size])
            shard_of = np.repeat(np.arange(len(sizes)), sizes)
            allowed = {int(shard_of[index]) for index in owned}
            assert set(order.shards(step, rank * share, (rank + 1) * share)) <= allowed
        assert set(order._windows) <= set(range(4 * rank // world_size, 4 * (rank + 1) // world_size))


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


def test_the_batch_size_does_not_change_the_stream_of_one_lane() -> None:
    sizes = [10, 30, 20, 4]
    few, many = (Order(sizes, batch, 3, window=2, lanes=1) for batch in (8, 32))
    assert epoch_of(few, 2) == epoch_of(many, 2)


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
    order = Order([20, 9, 30, 12, 25, 16], 48, seed=1, window=2)
    assert order.lanes == 3
    assert [position.index for position in order.batch(0)[::6] + order.batch(3)[::6]] == [
        36,
        38,
        32,
        67,
        2,
        5,
        92,
        84,
        3,
        77,
        79,
        110,
        27,
        24,
        53,
        46,
    ]


def test_samples_are_mixed_well_inside_a_window() -> None:
    # Mean place of each sample over 400 epochs: the middle, within five standard errors.
    order = Order([10] * 5, 50, seed=0, window=5)
    places = np.array([np.argsort([p.index for p in order.batch(step)]) for step in range(400)])
    error = np.sqrt((50**2 - 1) / 12 / 400)
    assert np.abs(places.mean(0) - 24.5).max() < 5 * error


def test_memory_is_that_of_shards_and_one_window_of_each_lane() -> None:
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


def test_steps_and_rows_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="step is -1"):
        Order([3], 1, 0).batch(-1)
    for rows in ((0, 3), (2, 1), (-1, 1)):
        with pytest.raises(InputError, match="asked of a global batch of 2"):
            Order([3], 2, 0).batch(0, *rows)
