"""Caches are explicit state: what goes in comes out, row by row, and nothing is hidden."""

from __future__ import annotations

import pytest
import torch

from sky_core.errors import UserError
from sky_core.model.cache import Cache, KVCache, LayerCache
from sky_core.model.context import Context


def ones(batch: int, length: int, value: float) -> torch.Tensor:
    return torch.full((batch, 2, length, 4), value)


def empty(batch: int = 2, slots: int = 6) -> tuple[Cache, KVCache]:
    layer = KVCache.empty(batch, 2, slots, 4, 4, torch.device("cpu"), torch.float32)
    return Cache([0] * batch, slots, [layer], [None]), layer


def passed(cache: Cache, length: int) -> Context:
    return Context.begin(torch.zeros(len(cache.lengths), length), 6, cache=cache)


def test_aligned_rows_are_written_behind_each_other() -> None:
    cache, layer = empty()
    for value, length in ((1.0, 3), (2.0, 1)):
        k, v = layer.update(ones(2, length, value), ones(2, length, -value), passed(cache, length))
        cache.advance([length] * 2)
    assert k[0, 0, :, 0].tolist() == [1, 1, 1, 2]
    assert v[1, 1, :, 3].tolist() == [-1, -1, -1, -2]


def test_ragged_rows_are_written_each_behind_its_own_end() -> None:
    cache, layer = empty()
    layer.update(ones(2, 3, 1.0), ones(2, 3, 1.0), passed(cache, 3))
    cache.advance([1, 3])
    k, _ = layer.update(ones(2, 2, 2.0), ones(2, 2, 2.0), passed(cache, 2))
    assert k[0, 0, :, 0].tolist() == [1, 2, 2, 0, 0]
    assert k[1, 0, :, 0].tolist() == [1, 1, 1, 2, 2]


def test_selected_rows_are_copies() -> None:
    cache, layer = empty()
    layer.update(ones(2, 3, 1.0), ones(2, 3, 1.0), passed(cache, 3))
    cache.advance([3, 2])
    picked = cache.select([1, 1, 0])
    assert picked.lengths == [2, 2, 3]
    picked.layers[0].k_BHSE.zero_()
    assert layer.k_BHSE[:, :, :3].eq(1).all()


def test_emptied_rows_have_length_zero_and_the_rest_stays() -> None:
    cache, _ = empty()
    cache.advance([3, 2])
    cache.reset([0])
    assert cache.lengths == [0, 2]


def test_rows_go_back_and_write_over_what_they_left() -> None:
    cache, layer = empty()
    layer.update(ones(2, 5, 1.0), ones(2, 5, 1.0), passed(cache, 5))
    cache.advance([5, 5])
    cache.rollback([2, 4])
    assert cache.lengths == [2, 4]
    k, _ = layer.update(ones(2, 1, 2.0), ones(2, 1, 2.0), passed(cache, 1))
    assert k[0, 0, :3, 0].tolist() == [1, 1, 2]
    assert k[1, 0, :5, 0].tolist() == [1, 1, 1, 1, 2]
    with pytest.raises(ValueError, match=r"rows of \[2, 4\] tokens cannot go back to \[3, 4\]"):
        cache.rollback([3, 4])


def test_a_state_goes_back_only_if_it_says_so() -> None:
    class Sum(KVCache):
        rewind = LayerCache.rewind

    cache, layer = empty()
    cache.memories = [Sum(layer.k_BHSE, layer.v_BHSE)]
    with pytest.raises(UserError, match="Sum cannot take tokens back"):
        cache.rollback(cache.lengths)


def test_joined_rows_are_those_of_the_first_then_those_of_the_second() -> None:
    (first, one), (second, two) = empty(batch=1), empty(batch=2)
    one.k_BHSE.fill_(1.0)
    two.k_BHSE.fill_(2.0)
    first.advance([3])
    second.advance([1, 2])
    both = first.join(second)
    assert both.lengths == [3, 1, 2]
    assert both.layers[0].tensors()["k"][:, 0, 0, 0].tolist() == [1, 2, 2]
    assert both.memories == [None]


def test_bytes_are_those_of_all_tensors() -> None:
    cache, _ = empty(batch=2, slots=6)
    assert cache.nbytes() == 2 * (2 * 2 * 6 * 4) * 4


def test_detached_state_shares_values_and_no_graph() -> None:
    _, layer = empty()
    layer.k_BHSE = layer.k_BHSE + torch.ones(1, requires_grad=True)
    assert layer.tensors()["k"].requires_grad
    assert not layer.detach().tensors()["k"].requires_grad
    assert torch.equal(layer.detach().tensors()["k"], layer.tensors()["k"])
