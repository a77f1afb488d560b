"""Samples, batches, microbatches and lanes: the same at every party, on every machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.core.batching import batch_slice, lane_batches, microbatch_sizes, permutation, round_steps
from cutlayer.core.parts import Training


def test_the_order_of_samples_is_fixed_for_ever():
    """Written down: another Python or release that shuffles otherwise would break running federations."""
    assert permutation(0, 1, 0, 10) == [6, 2, 4, 3, 5, 8, 0, 7, 9, 1]
    assert permutation(7, 3, 2, 8) == [0, 5, 7, 1, 2, 4, 6, 3]
    assert permutation(0, 1, 0, 0) == []


@given(st.integers(), st.integers(0), st.integers(0, 20), st.integers(0, 60))
def test_the_order_is_a_permutation(seed, epoch, lane, count):
    assert sorted(permutation(seed, epoch, lane, count)) == list(range(count))


def test_seed_epoch_and_lane_each_change_the_order():
    orders = {tuple(permutation(*key, 20)) for key in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]}
    assert len(orders) == 4


@given(st.integers(1, 500), st.integers(1, 500))
def test_microbatches_differ_by_one_at_most_larger_ones_first(batch, parts):
    sizes = microbatch_sizes(batch, parts)
    assert sum(sizes) == batch
    assert len(sizes) == min(batch, parts)
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(st.integers(0, 300), st.integers(1, 40), st.booleans())
def test_batches_cover_each_sample_once(count, batch_size, drop_last):
    sizes = lane_batches(count, batch_size, drop_last)
    rows = [list(range(count))[batch_slice(step, count, batch_size)] for step in range(len(sizes))]
    assert [len(row) for row in rows] == sizes
    used = count - count % batch_size if drop_last else count
    assert [row for batch in rows for row in batch] == list(range(used))
    assert all(size == batch_size for size in sizes[:-1])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_a_round_has_every_batch_once(counts, batch_size, parts, drop_last):
    """Groups of equal steps, unrolled, are the lanes' batches: one lane after another, or side by side."""
    training = Training(batch_size=batch_size, microbatches=min(parts, batch_size))
    expected = [
        [microbatch_sizes(size, training.microbatches) for size in lane_batches(count, batch_size, drop_last)]
        for count in counts
    ]

    def unrolled(turn):
        return [group.sizes for group in turn for _ in range(group.repeat)]

    relay = round_steps(counts, training, relay=True, drop_last=drop_last)
    assert len(relay) == len(counts)
    for lane, turn in enumerate(relay):
        assert [sizes[lane] for sizes in unrolled(turn)] == expected[lane]
        assert all(part is None for sizes in unrolled(turn) for other, part in enumerate(sizes) if other != lane)
    (parallel,) = round_steps(counts, training, relay=False, drop_last=drop_last)
    for lane, mine in enumerate(expected):
        found = [sizes[lane] for sizes in unrolled(parallel)]
        assert found[: len(mine)] == mine
        assert all(part is None for part in found[len(mine) :])
    assert len(unrolled(parallel)) == max(map(len, expected))


@pytest.mark.parametrize("relay", [True, False])
def test_a_long_round_stays_short(relay):
    turns = round_steps([10**5, 10**5 + 1], Training(batch_size=10), relay=relay, drop_last=False)
    assert sum(len(turn) for turn in turns) == (3 if relay else 2)
