"""Timing several contenders in one session: A B C A B C ..., so that what slows the machine slows all of them.

Medians over rounds stand against an odd disturbed one. A ratio is taken of neighbours, inside each round, before the
median: what changes from round to round (clocks, other work) cancels, where a ratio of two medians would keep it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

Work = Callable[[], object]


def nothing() -> None:
    """The synchronisation of a device that has none to wait for."""


@dataclass
class Rounds:
    """`seconds[name][r]`: what contender `name` took in round r."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def rates(self, name: str, amount: float) -> list[float]:
        """`amount` per second, round by round (tokens/s of that many tokens)."""
        return [amount / seconds for seconds in self.seconds[name]]

    def times_faster(self, ours: str, theirs: str) -> list[float]:
        """How many times faster `ours` was than `theirs`, round by round."""
        pairs = zip(self.seconds[theirs], self.seconds[ours], strict=True)
        return [slow / fast for slow, fast in pairs]

    def best(self, names: list[str]) -> str:
        """The one of `names` with the lowest median."""
        return min(names, key=lambda name: statistics.median(self.seconds[name]))


def interleave(
    contenders: Mapping[str, Work],
    rounds: int,
    *,
    warmup: int = 1,
    synchronize: Callable[[], None] = nothing,
    progress: Callable[[str, int], None] | None = None,
) -> Rounds:
    """Each contender once per round, `rounds` times, after `warmup` rounds that are not counted (compilation, caches).

    `synchronize` waits until the device has done what was asked of it; `progress(name, round)` is told of each turn,
    warm-up at round 0, outside of the time that counts.
    """
    found = Rounds({name: [] for name in contenders})
    with collector_paused():
        for turn in range(rounds + warmup):
            counted = max(0, turn + 1 - warmup)
            for name, work in contenders.items():
                if progress is not None:
                    progress(name, counted)
                synchronize()
                started = time.perf_counter()
                work()
                synchronize()
                if counted:
                    found.seconds[name].append(time.perf_counter() - started)
            gc.collect()
    return found


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside: it would fall into the time of whoever is on turn."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
