"""The keyed permutation behind shuffling: a bijection for every size, chosen by its key, that looks random."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sky_core.data.permute import Permutation, Shuffle, draw


@given(n=st.integers(1, 3000), key=st.lists(st.integers(0, 2**40), max_size=3))
def test_it_is_a_bijection_for_every_size_and_key(n: int, key: list[int]) -> None:
    assert np.array_equal(np.sort(Permutation(n, *key)(np.arange(n))), np.arange(n))


def test_one_item_costs_no_table_however_many_there_are() -> None:
    n = 10**18
    moved = Permutation(n, 1)(np.arange(1000))
    assert len(set(moved.tolist())) == 1000
    assert 0 <= moved.min() <= moved.max() < n


def test_items_can_be_moved_in_any_shape_and_portion() -> None:
    permutation = Permutation(77, 5)
    whole = permutation(np.arange(77))
    assert np.array_equal(permutation(np.arange(77).reshape(7, 11)), whole.reshape(7, 11))
    assert [int(permutation(np.array(i))) for i in range(77)] == whole.tolist()


@pytest.mark.parametrize("n", [3, 8, 20, 100])
def test_every_item_lands_everywhere_equally_often(n: int) -> None:
    """Chi-squared over (item, place): (n-1)² degrees of freedom, of which z is nearly standard normal. |z| < 5 holds
    for a true shuffle but once in two million; four rounds give z = 70 for n = 20."""
    keys, items = 2000, np.arange(n)
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[items, Permutation(n, key)(items)] += 1
    freedom = (n - 1) ** 2
    chi_squared = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert abs(chi_squared - freedom) / math.sqrt(2 * freedom) < 5


def test_all_orders_of_four_occur() -> None:
    seen = {tuple(Permutation(4, key)(np.arange(4)).tolist()) for key in range(1000)}
    assert seen == set(permutations(range(4)))


def test_neighbours_do_not_stay_neighbours() -> None:
    """Serial correlation of a random order of n is about normal with deviation 1/√n: 5 deviations."""
    n = 10_000
    moved = Permutation(n, 3)(np.arange(n)).astype(float)
    assert abs(np.corrcoef(moved[:-1], moved[1:])[0, 1]) < 5 / math.sqrt(n)
    assert np.sum(np.abs(np.diff(moved)) == 1) < 10  # 2 are expected


def test_keys_give_unrelated_orders() -> None:
    n = 5000
    orders = [Permutation(n, seed, epoch)(np.arange(n)) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(n)
            assert np.sum(one == other) < 10  # 1 is expected


@settings(deadline=None)
@given(n=st.integers(1, 9000), start=st.integers(0, 30_000), count=st.integers(0, 200), seed=st.integers(0, 5))
def test_the_endless_stream_is_the_permutation_of_its_epoch(n: int, start: int, count: int, seed: int) -> None:
    epochs, items = Shuffle(n, seed)(start, count)
    for i, epoch, item in zip(range(start, start + count), epochs.tolist(), items.tolist(), strict=True):
        assert epoch == i // n
        if i % 17 == 0 or count < 5:
            assert item == int(Permutation(n, seed, epoch)(np.array(i % n)))


def test_a_draw_is_in_range_and_uniform() -> None:
    draws = np.array([draw(7, 1, epoch) for epoch in range(7000)])
    assert abs(np.bincount(draws, minlength=7) - 1000).max() < 150  # 5 deviations of a binomial with variance 857
