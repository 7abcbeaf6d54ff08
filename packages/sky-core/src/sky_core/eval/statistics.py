"""Standard errors of what evaluations report: of means, and of ratios of sums.

mean     s.e. = s / √n,  s² = Σ (y_i - ȳ)² / (n - 1)                                  accuracies, mean log-probabilities
ratio    r = Σ y_i / Σ x_i,  s.e. = √(n / (n - 1) · Σ (y_i - r x_i)²) / Σ x_i         nats per token, bits per byte

The ratio's is the linearised variance of Cochran, Sampling Techniques (3rd ed., 1977), equation 6.13, without the
finite-population factor. Its units i are whole sequences: the tokens of one sequence are far from independent, so the
s / √tokens that is often quoted is too small. Sequences cut from one document are still related; a few long documents
are a smaller sample than their number of sequences says.

One item has no standard error: None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of `values` (at least one) and its standard error."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def ratio_stderr(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float | None]:
    """Σ numerators / Σ denominators (> 0), and its standard error over the pairs."""
    n, total = len(numerators), math.fsum(denominators)
    ratio = math.fsum(numerators) / total
    if n == 1:
        return ratio, None
    squares = math.fsum((y - ratio * x) ** 2 for y, x in zip(numerators, denominators, strict=True))
    return ratio, math.sqrt(n / (n - 1) * squares) / total


def named(name: str, value: float, stderr: float | None) -> dict[str, float]:
    """`{name: value, name_stderr: stderr}`, as evaluations report them."""
    return {name: value} if stderr is None else {name: value, f"{name}_stderr": stderr}
