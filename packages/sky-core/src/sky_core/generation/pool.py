"""Places for rows in one cache, allocated once: rows come and go, the storage stays where it is.

A pass over some places works on views of the cache. A layer whose state writes in place (`KVCache`) needs nothing more;
a state that a pass replaces by another (recurrent memories) is written back. What a row leaves behind stays in its
place until the next one comes, so that a prompt which begins alike can start from it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sky_core.errors import UserError
from sky_core.model.cache import Cache, LayerCache

if TYPE_CHECKING:
    from sky_core.generation.row import Row

log = logging.getLogger("sky_core.generation")


class Pool:
    """`cache` and, place by place, the row that its tokens are of (`rows`): the first `cache.lengths[place]` of that
    row's context. `cuts` says whether every layer can forget the end of a row and keep its beginning."""

    worth = 16
    """Fewest common tokens that are copied: to read fewer again takes no longer than the copy of a row."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.max_length = cache, cache.max_length
        self.rows: list[Row | None] = [None] * len(cache.lengths)
        self._told = False
        try:
            cache.rollback(cache.lengths)
        except UserError:
            self.cuts = False
        else:
            self.cuts = True

    @contextmanager
    def places(self, first: int, stop: int) -> Iterator[Cache]:
        """The places from `first` up to `stop` as a cache of their own, for one pass."""
        if stop - first == len(self.rows):
            yield self.cache
            return
        states = (self.cache.layers, self.cache.memories)
        part = Cache(
            self.cache.lengths[first:stop],
            self.max_length,
            *([state and _view(state, first, stop) for state in kind] for kind in states),
        )
        yield part
        self.cache.lengths[first:stop] = part.lengths
        for mine, seen in zip(self.cache.states, part.states, strict=True):
            now = seen.tensors()
            for name, tensor in _view(mine, first, stop).tensors().items():
                if tensor.data_ptr() != now[name].data_ptr():
                    tensor.copy_(now[name])

    def lend_idle(self, count: int, rows: int) -> int:
        """How many of the first `rows` places a step of the first `count` may pass over: all, where an idle place can
        take a token behind its end and forget it again; a full one is emptied for that."""
        if not self.cuts:
            return count
        rows = min(rows, len(self.rows))
        for place in range(count, rows):
            if self.cache.lengths[place] == self.max_length:
                self.forget(place, place + 1)
                self.cache.lengths[place] = 0
        return rows

    def likest(self, context: Sequence[int]) -> tuple[int, int]:
        """(place, tokens) of the longest beginning of `context`, without its last token, that a row can start from."""
        place, most, missed = 0, 0, 0
        for i, row in enumerate(self.rows):
            held = self.cache.lengths[i]
            if row is None or held <= most:
                continue
            shared = common(row.tokens[row.start : row.start + held], context[:-1])
            if not self.cuts and shared < held:
                missed = max(missed, shared)
            elif shared > most:
                place, most = i, shared
        if missed >= self.worth and missed > most and not self._told:
            self._told = True
            log.info(
                "the cache of this model cannot be cut back: a prompt that begins like another one is read in whole"
            )
        return (place, most) if most >= self.worth else (0, 0)

    def begin(self, place: int, row: Row, source: int, held: int) -> None:
        """Give `place` to `row`, whose first `held` tokens lie in the place `source`."""
        if held:
            self.copy(source, place)
            if held < self.cache.lengths[place]:
                with self.places(place, place + 1) as part:
                    part.rollback([held])
        else:
            self.cache.reset([place])
        self.rows[place] = row

    def copy(self, source: int, place: int) -> None:
        """What lies in the place `source`, in `place` as well."""
        if source == place:
            return
        for tensor in self.cache.tensors():
            tensor[place].copy_(tensor[source])
        self.cache.lengths[place], self.rows[place] = self.cache.lengths[source], self.rows[source]

    def move(self, source: int, place: int) -> None:
        """What lies in the place `source`, in `place` instead."""
        if source != place:
            self.copy(source, place)
            self.rows[source] = None

    def forget(self, first: int, stop: int, *, erase: bool = False) -> None:
        """Let no row start from these places; with `erase` nothing of them stays (a mask does not hide NaN)."""
        self.rows[first:stop] = [None] * (stop - first)
        if erase:
            for tensor in self.cache.tensors():
                tensor[first:stop].zero_()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows have in common from their beginning on."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _view(state: LayerCache, first: int, stop: int) -> LayerCache:
    return state.replace({name: tensor[first:stop] for name, tensor in state.tensors().items()})
