"""Which ratios fell since another record: a guard against regressions that is no timed test.

Only ratios are held to each other (ours over a peer, a share of the machine's own ceiling, measured in one session):
tokens per second change with the machine, ratios much less. A measure that is a ratio says which way is `better`.

The rule. The spread of a measure is the distance between its quartiles (with less than four values: between the lowest
and the highest). A ratio fell when its median got worse

    by more than the spread of the old record and that of the new one together, and by more than 2 %.

Were nothing changed and the rounds independent, with standard deviation σ each: medians of n = 5 rounds differ by
about 0.8 σ, the spreads together are about 2.7 σ: a false alarm is rarer than one in a thousand, and a fall of 3 σ is
seen. The 2 % are for ratios with one value or hardly any spread, such as memory.
"""

from __future__ import annotations

from typing import Any

from sky_core.bench.record import shown

LEAST = 0.02
"""Relative changes up to this are never called a fall."""


def spread_of(measure: dict[str, Any]) -> float:
    """The distance between the quartiles of a measure, between the extremes where there are too few values."""
    first, third = measure.get("quartiles") or (measure["low"], measure["high"])
    return float(third - first)


def fell(new: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether the ratio got worse by more than the spread of both and more than `LEAST` of its old value."""
    loss = base["value"] - new["value"] if base["better"] == "higher" else new["value"] - base["value"]
    return loss > spread_of(new) + spread_of(base) and loss > LEAST * abs(base["value"])


def fallen(new: dict[str, Any], base: dict[str, Any]) -> tuple[list[str], int]:
    """A line for each ratio that fell, and how many ratios both records have."""
    then = {measure["what"]: measure for measure in base["measures"] if measure.get("better")}
    common = [(now, then[now["what"]]) for now in new["measures"] if now.get("better") and now["what"] in then]
    lines = [
        f"{now['what']}: {shown(was['value'])} -> {shown(now['value'])} {now['unit']}"
        f" (spread {shown(spread_of(was))} and {shown(spread_of(now))})"
        for now, was in common
        if fell(now, was)
    ]
    return lines, len(common)
