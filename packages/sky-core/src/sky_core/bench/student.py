"""Is one recipe better than another? The interval of a paired difference, and how many pairs would tell.

With n differences d_i (recipe B minus recipe A, both of seed i), mean d̄ and standard deviation s,

    d̄ ± t s / √n,    t the (1 + confidence) / 2 quantile of Student's t with ν = n - 1 degrees of freedom

(Student 1908, The Probable Error of a Mean). Pairing by seed takes out what a seed does to both. Where the interval
holds 0 the recipes are not distinguishable by these seeds.

For whole ν the distribution is a finite sum (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4): with θ = atan(t / √ν),

    P(|T| ≤ t) = 2/π (θ + sin θ (cos θ + 2/3 cos³ θ + ... + (2·4···(ν-3)) / (1·3···(ν-2)) cos^(ν-2) θ))     ν odd
                 sin θ (1 + 1/2 cos² θ + (1·3)/(2·4) cos⁴ θ + ... + (1·3···(ν-3)) / (2·4···(ν-2)) cos^(ν-2) θ)  ν even

and its quantile is found by bisection.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

MOST_PAIRS = 1000
"""Where more pairs than this would be needed, nobody will run them."""


def within(t: float, dof: int) -> float:
    """P(|T| ≤ t) of Student's t with `dof` (≥ 1) degrees of freedom, t ≥ 0."""
    theta = math.atan(t / math.sqrt(dof))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = dof % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, dof + 1, 2):  # the term of cos^(k - 2)
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def t_quantile(confidence: float, dof: int) -> float:
    """The t with P(|T| ≤ t) = `confidence` (0 < confidence < 1). Raises `ValueError` outside of that."""
    if not 0 < confidence < 1 or dof < 1:
        raise ValueError(f"no quantile for a confidence of {confidence} with {dof} degrees of freedom")
    high = 1.0
    while within(high, dof) < confidence:
        high *= 2
    low = 0.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if within(middle, dof) < confidence else (low, middle)
    return middle


@dataclass(frozen=True)
class Interval:
    """A mean difference with its confidence interval; `low` and `high` are infinite for a single pair."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


def paired(differences: Sequence[float], confidence: float = 0.95) -> Interval:
    """The interval of the mean of paired differences (one at least)."""
    n, mean = len(differences), statistics.fmean(differences)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = t_quantile(confidence, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def pairs_needed(differences: Sequence[float], confidence: float = 0.95) -> int | None:
    """The fewest pairs whose interval would leave 0 out if mean and deviation stayed what they are here.

    None for fewer than two differences, or when more than `MOST_PAIRS` would be needed.
    """
    if len(differences) < 2:
        return None
    mean, deviation = abs(statistics.fmean(differences)), statistics.stdev(differences)

    def tells(n: int) -> bool:
        return t_quantile(confidence, n - 1) * deviation / math.sqrt(n) < mean

    if not tells(MOST_PAIRS):
        return None
    return bisect_left(range(MOST_PAIRS), True, lo=2, key=tells)
