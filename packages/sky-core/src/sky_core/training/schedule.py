"""Learning-rate schedules: pure functions of the step, relative to the peak.

With w warm-up steps, final ratio f and the step t counted from 0, every schedule starts with

    (t + 1) / (w + 1)    for t < w,

reaches 1 at t = w, and goes on as

    constant   1
    linear     1 - (1 - f) r                            r = (t - w) / (T - w), T the last step's successor
    cosine     f + (1 - f) (1 + cos π r) / 2            Loshchilov & Hutter 2017 (arXiv:1608.03983) without restarts
    wsd        1, then over the last D steps            Hu et al. 2024 (arXiv:2404.06395), warm-up stable decay
               f + (1 - f) (1 - r)   (linear)           r = (t - (T - D)) / D
               f + (1 - f) (1 - √r)  (sqrt)             Hägele et al. 2024 (arXiv:2405.18392), "1-sqrt"

Warm-up and cosine are nanoGPT's `get_lr`, number for number. The ratio f is what step T would get, so no step of a
run is spent at f itself (or at zero).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from sky_core.errors import ConfigError

Multiplier = Callable[[int], float]
WsdShape = Literal["linear", "sqrt"]


def count_steps(key: str, amount: float, steps: int) -> int:
    """`amount` in steps: a number of them from 1 up, a fraction of `steps` below 1."""
    if amount < 1:
        return round(amount * steps)
    if amount != int(amount):
        raise ConfigError(f"schedule.{key}: {amount} is neither a whole number of steps nor a fraction below 1")
    return int(amount)


def warmup_steps(warmup: float, end: int) -> int:
    """The warm-up in steps. `ConfigError` when it leaves no step before `end`."""
    w = count_steps("warmup", warmup, end)
    if w >= end:
        raise ConfigError(f"schedule.warmup: {w} warm-up steps leave none of {end}; lower it or raise train.steps")
    return w


def risen(w: int, after: Multiplier) -> Multiplier:
    """A linear rise over `w` steps, then `after`."""
    return lambda step: (step + 1) / (w + 1) if step < w else after(step)


def constant(steps: int, *, warmup: float = 0) -> Multiplier:
    """1 after the warm-up."""
    return risen(warmup_steps(warmup, steps), lambda _: 1.0)


def linear(steps: int, *, warmup: float = 0, final: float = 0.0, decay_steps: int | None = None) -> Multiplier:
    """Falls on a line to `final` at `decay_steps` (default: the end of the run), then stays there."""
    end = decay_steps or steps
    w = warmup_steps(warmup, end)
    return risen(w, lambda step: 1 - (1 - final) * min((step - w) / (end - w), 1.0))


def cosine(steps: int, *, warmup: float = 0, final: float = 0.1, decay_steps: int | None = None) -> Multiplier:
    """Falls on half a cosine to `final` at `decay_steps` (default: the end of the run), then stays there."""
    end = decay_steps or steps
    w = warmup_steps(warmup, end)

    def after(step: int) -> float:
        ratio = min((step - w) / (end - w), 1.0)
        return final + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (1 - final)

    return risen(w, after)


def wsd(
    steps: int, *, warmup: float = 0, decay: float = 0.2, final: float = 0.0, shape: WsdShape = "sqrt"
) -> Multiplier:
    """Stays at 1 until the last `decay` steps (or fraction of the run), which fall to `final`.

    `ConfigError` when warm-up and decay overlap.
    """
    w, d = warmup_steps(warmup, steps), count_steps("decay", decay, steps)
    if w + d > steps:
        raise ConfigError(f"schedule.decay: {w} warm-up and {d} decay steps are more than the run's {steps}; lower one")
    stable_end = steps - d

    def after(step: int) -> float:
        if step < stable_end:
            return 1.0
        ratio = (step - stable_end) / d
        return final + (1 - final) * (1 - (math.sqrt(ratio) if shape == "sqrt" else ratio))

    return risen(w, after)
