"""Standard errors: the textbook's for means, what sampling shows for ratios."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sky_core.eval.statistics import mean_stderr, named, ratio_stderr

FLOATS = st.floats(-100, 100)


@given(st.lists(FLOATS, min_size=2, max_size=50))
def test_the_mean_is_the_textbooks(values: list[float]) -> None:
    mean, stderr = mean_stderr(values)
    assert mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert stderr == pytest.approx(statistics.stdev(values) / len(values) ** 0.5, abs=1e-9)


@given(st.lists(FLOATS, min_size=2, max_size=50), st.floats(0.1, 10))
def test_a_ratio_to_equal_sizes_is_a_mean(values: list[float], size: float) -> None:
    ratio, stderr = ratio_stderr([value * size for value in values], [size] * len(values))
    mean, mean_error = mean_stderr(values)
    assert ratio == pytest.approx(mean, abs=1e-9)
    assert stderr == pytest.approx(mean_error, abs=1e-9)


def test_a_ratio_errs_as_much_as_it_says() -> None:
    """Sequences of very different lengths: over 2000 samples the spread of the ratio is its mean standard error.

    The spread of 2000 draws is itself known to 1.6 %, and the linearisation is off by about 1 / n: 5 %.
    """
    generator = random.Random(0)
    ratios, errors = [], []
    for _ in range(2000):
        sizes = [generator.randint(1, 64) for _ in range(100)]
        costs = [size * generator.gauss(3, 0.5) for size in sizes]
        ratio, stderr = ratio_stderr(costs, sizes)
        assert stderr is not None
        ratios.append(ratio)
        errors.append(stderr)
    assert statistics.stdev(ratios) == pytest.approx(statistics.fmean(errors), rel=0.05)


def test_one_item_has_no_standard_error() -> None:
    assert mean_stderr([3.0]) == (3.0, None)
    assert ratio_stderr([6.0], [2]) == (3.0, None)
    assert named("accuracy", 3.0, None) == {"accuracy": 3.0}
    assert named("accuracy", 3.0, 0.5) == {"accuracy": 3.0, "accuracy_stderr": 0.5}
