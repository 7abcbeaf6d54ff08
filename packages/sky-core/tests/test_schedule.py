"""Schedules: nanoGPT's own function as the oracle, and what holds for all of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sky_core.components.optimization import WSD, Constant, Cosine, Linear
from sky_core.errors import ConfigError
from sky_core.training import schedule

LR, MIN_LR = 1e-3, 1e-4


def nanogpt_get_lr(it: int, warmup_iters: int, lr_decay_iters: int) -> float:
    """karpathy/nanoGPT train.py, `get_lr`."""
    if it < warmup_iters:
        return LR * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return MIN_LR
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return MIN_LR + coeff * (LR - MIN_LR)


@pytest.mark.parametrize(("warmup", "decay_steps"), [(100, 2000), (0, 2000), (100, 1500), (1, 2)])
def test_cosine_is_nanogpts(warmup: int, decay_steps: int) -> None:
    multiplier = Cosine(warmup=warmup, final=MIN_LR / LR, decay_steps=decay_steps).build(2000)
    for it in range(2000):
        # Equal up to the rounding of (min_lr / lr) * lr in float64.
        assert LR * multiplier(it) == pytest.approx(nanogpt_get_lr(it, warmup, decay_steps), rel=1e-14)


COMPONENTS = st.one_of(
    st.builds(Constant, warmup=st.floats(0, 0.4)),
    st.builds(Linear, warmup=st.floats(0, 0.4), final=st.floats(0, 1)),
    st.builds(Cosine, warmup=st.floats(0, 0.4), final=st.floats(0, 1)),
    st.builds(
        WSD,
        warmup=st.floats(0, 0.4),
        decay=st.floats(0, 0.5),
        final=st.floats(0, 1),
        shape=st.sampled_from(["linear", "sqrt"]),
    ),
)


@given(component=COMPONENTS, steps=st.integers(1, 300))
def test_every_schedule_rises_to_one_and_never_rises_again(component: Constant, steps: int) -> None:
    multiplier = component.build(steps)
    values = [multiplier(step) for step in range(steps)]
    peak = values.index(1.0)
    assert peak == round(component.warmup * steps)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(values[peak:], values[peak + 1 :], strict=False))
    assert min(values) > 0 or getattr(component, "final", 1) == 0
    assert [multiplier(step) for step in range(steps)] == values


def test_a_final_ratio_is_what_the_step_after_the_last_would_get() -> None:
    for build in (schedule.linear, schedule.cosine, schedule.wsd):
        multiplier = build(50, warmup=5, final=0.25)
        assert multiplier(49) > 0.25
        assert multiplier(50) == pytest.approx(0.25)


def test_wsd_is_flat_then_falls_over_its_last_steps() -> None:
    for shape, half in (("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))):
        multiplier = schedule.wsd(100, warmup=10, decay=20, shape=shape)
        assert [multiplier(step) for step in range(10, 81)] == [1.0] * 71
        assert multiplier(81) < 1
        assert multiplier(90) == pytest.approx(half)


def test_warmup_and_decay_are_steps_or_fractions_of_the_run() -> None:
    by_steps, by_fraction = schedule.wsd(200, warmup=10, decay=40), schedule.wsd(200, warmup=0.05, decay=0.2)
    assert [by_steps(step) for step in range(200)] == [by_fraction(step) for step in range(200)]


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (Cosine(warmup=50), r"schedule\.warmup: 50 warm-up steps leave none of 50; lower it or raise train\.steps"),
        (Cosine(warmup=20, decay_steps=20), r"schedule\.warmup: 20 warm-up steps leave none of 20"),
        (Linear(warmup=1.5), r"schedule\.warmup: 1\.5 is neither a whole number of steps nor a fraction below 1"),
        (WSD(warmup=30, decay=30), r"schedule\.decay: 30 warm-up and 30 decay steps are more than the run's 50"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_says_so_in_one_line(component: Cosine, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        component.build(50)
    assert "\n" not in str(caught.value)
