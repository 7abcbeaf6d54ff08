"""What a change will cost: time and memory of a training step against length, width, depth, batch and vocabulary.

One axis at a time around a base shape, each point in a process of its own. Over the points of an axis

    log y = log a + p log x        y seconds of a step (median), bytes of peak memory; x the size along the axis

is fitted by least squares; the exponent p says by which power the cost grows (1: in proportion), its standard error
is √(Σ residual² / (n - 2) / Σ (log x - mean)²). Beside it stands the exponent on paper, the same fit of

    FLOPs of a step = tokens · `flops_per_token`
    bytes           = 16 N + tokens · L (8 D + 4 K + 4 F) · w        N parameters, K width of keys, F of feed-forward

16 bytes a parameter are weight, gradient and AdamW's two moments in fp32; 8 D + 4 K + 4 F numbers of w bytes (4 in
fp32, 2 in bf16) are what the backward pass of a gated pre-norm block keeps of a token. Neither is a power law, and
fixed costs (imports, kernels too small to fill the machine) pull the measured exponents down; that is the lesson.

Memory is the peak without the base of imports.

B sequences, T tokens of each, D model width, L layers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from sky_core.bench import memory
from sky_core.bench.ceilings import default_device
from sky_core.bench.defaults import AXES, BATCH, FACTORS, LENGTH, record_name
from sky_core.bench.record import Record
from sky_core.bench.report import Settings, figure, finish
from sky_core.bench.shape import Shape, find_shape
from sky_core.errors import UserError


@dataclass(frozen=True)
class PowerLaw:
    """y = factor · x^exponent; `stderr` is that of the exponent, None for two points."""

    exponent: float
    factor: float
    stderr: float | None


def power_law(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw:
    """The least-squares line through (log x, log y). Raises `ValueError` for less than two different x."""
    if len(set(xs)) < 2 or min(*xs, *ys) <= 0:
        raise ValueError("a power law needs two different sizes and positive values")
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = statistics.fmean(u), statistics.fmean(v)
    squares = math.fsum((a - mean_u) ** 2 for a in u)
    slope = math.fsum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / squares
    constant = mean_v - slope * mean_u
    if len(xs) == 2:
        return PowerLaw(slope, math.exp(constant), None)
    residual = math.fsum((b - constant - slope * a) ** 2 for a, b in zip(u, v, strict=True))
    return PowerLaw(slope, math.exp(constant), math.sqrt(residual / (len(xs) - 2) / squares))


@dataclass(frozen=True)
class Point:
    """One size along one axis, and the training step that it means."""

    axis: str
    x: int
    shape: Shape
    length: int
    batch: int


def points(base: Shape, length: int, batch: int, axis: str, factors: Sequence[float]) -> list[Point]:
    """The base with one size multiplied by each of the factors, rounded to what a model can have."""
    model = base.model
    heads, head = model.n_head, model.width_of_head
    found: dict[int, Point] = {}
    for factor in factors:
        if axis == "length":
            x = max(2, round(length * factor))
            point = Point(axis, x, base.at_length(x), x, batch)
        elif axis == "batch":
            x = max(1, round(batch * factor))
            point = Point(axis, x, base, length, x)
        elif axis == "depth":
            x = max(1, round(model.n_layer * factor))
            point = Point(axis, x, base.changed(n_layer=x), length, batch)
        elif axis == "vocabulary":
            x = max(2, round(base.vocab_size * factor))
            point = Point(axis, x, base.changed(vocab_size=x), length, batch)
        else:
            # Heads keep their width; there are more of them, and the feed-forward part follows.
            groups = heads // (model.n_kv_head or heads)
            n_head = max(groups, round(heads * factor / groups) * groups)
            x = n_head * head
            wider = {"n_head": n_head, "n_kv_head": n_head // groups, "d_model": x, "head_dim": head}
            point = Point(axis, x, base.changed(**wider, feedforward=_wider(model, x)), length, batch)
        found[x] = point
    return [found[x] for x in sorted(found)]


def _wider(model: Any, d_model: int) -> list[dict[str, Any]]:
    """The feed-forward parts with widths in the old proportion."""
    parts = []
    for part in model.feedforward:
        table = part.as_dict()
        if table.get("d_ff") is not None:
            table["d_ff"] = max(1, round(table["d_ff"] * d_model / model.d_model))
        parts.append(table)
    return parts


def paper_bytes(point: Point, parameters: int, precision: str) -> float:
    """Bytes of a training step by the formula above."""
    model = point.shape.model
    keys = (model.n_kv_head or model.n_head) * model.width_of_head
    hidden = max(getattr(part, "d_ff", None) or 8 * model.d_model // 3 for part in model.feedforward)
    numbers = model.n_layer * (8 * model.d_model + 4 * keys + 4 * hidden)
    return 16.0 * parameters + point.batch * point.length * numbers * (2 if precision == "bf16" else 4)


def run(
    settings: Settings,
    *,
    shape: str | None,
    length: int,
    batch: int,
    axes: str,
    factors: Sequence[float],
    precision: str,
    compile: bool,
    steps: int,
) -> None:
    """Measure and record. Raises `UserError` for an axis that is none."""
    names = axes.split(",")
    if unknown := [name for name in names if name not in AXES]:
        raise UserError(f"--axes {unknown[0]}: no such axis; use {', '.join(AXES)}")
    if settings.smoke:
        length, batch, steps, names, factors = 16, 2, 1, names[:1], (1.0, 2.0)
    if len(set(factors)) < 2:
        raise UserError("--factors: a power needs two different sizes at least")
    base = find_shape(shape, smoke=settings.smoke).at_length(length)
    name = record_name(
        "scaling", base.name, precision, "compiled" if compile else "",
        device=default_device(), T=(length, LENGTH), B=(batch, BATCH), A=(names, AXES), F=(factors, FACTORS),
    )  # fmt: skip
    record = Record(
        settings.options(name),
        what=f"exponents of a training step around {base.name}, {batch} x {length} tokens, {precision}",
        seeds=[0],
    )
    rows: list[dict[str, Any]] = []
    for axis in names:
        for point in points(base, length, batch, axis, factors):
            click.echo(f"{axis} {point.x}", err=True)
            table = memory.as_table(point.shape)
            task = memory.Task("ours", table, point.length, point.batch, precision, compile, steps)
            rows.append(_row(point, memory.measure(task), precision))
    fits = {axis: fit([row for row in rows if row["axis"] == axis]) for axis in names}
    for axis, laws in fits.items():
        for what in ("seconds", "bytes"):
            measured, paper = laws[what], laws[f"{what} on paper"]
            error = measured.stderr or 0.0
            record.measure(
                f"{axis}: exponent of the {'time' if what == 'seconds' else 'memory'}, ± one standard error",
                [measured.exponent - error, measured.exponent, measured.exponent + error],
                "",
                peer=("on paper", paper.exponent),
                better="lower",
            )
    finish(
        record,
        settings,
        plot(base.name, rows, fits),
        sizes={"shape": base.name, "model": base.model.as_dict(), "vocabulary": base.vocab_size, "length": length,
               "batch": batch, "precision": precision, "compile": compile, "factors": list(factors)},
        fits={axis: {what: asdict(law) for what, law in laws.items()} for axis, laws in fits.items()},
        runs=rows,
    )  # fmt: skip


def _row(point: Point, found: memory.Found, precision: str) -> dict[str, Any]:
    tokens = point.batch * point.length
    return {
        "axis": point.axis,
        "x": point.x,
        "seconds": statistics.median(found.seconds),
        "all_seconds": found.seconds,
        "bytes": max(1, found.peak - found.base),
        "parameters": found.parameters,
        "flops_on_paper": tokens * found.flops_per_token,
        "bytes_on_paper": paper_bytes(point, found.parameters, precision),
    }


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, PowerLaw]:
    """The power laws of one axis, measured and on paper."""
    xs = [row["x"] for row in rows]
    columns = {
        "seconds": "seconds",
        "seconds on paper": "flops_on_paper",
        "bytes": "bytes",
        "bytes on paper": "bytes_on_paper",
    }
    return {what: power_law(xs, [row[column] for row in rows]) for what, column in columns.items()}


def plot(name: str, rows: list[dict[str, Any]], fits: dict[str, dict[str, PowerLaw]]) -> Callable[[Path], None]:
    """Relative time and memory against relative size, log-log, a line for each axis."""

    def draw(path: Path) -> None:
        with figure(path, (10, 4.2), columns=2) as (left, right):
            for axes, what, title in ((left, "seconds", "time of a step"), (right, "bytes", "memory")):
                for axis, laws in fits.items():
                    own = [row for row in rows if row["axis"] == axis]
                    xs, ys = [row["x"] / own[0]["x"] for row in own], [row[what] / own[0][what] for row in own]
                    law = laws[what]
                    (line,) = axes.plot(xs, ys, "o", label=f"{axis}: {law.exponent:.2f}")
                    start = law.factor * own[0]["x"] ** law.exponent / own[0][what]
                    axes.plot(xs, [start * x**law.exponent for x in xs], "-", color=line.get_color(), linewidth=1)
                axes.set(xscale="log", yscale="log", xlabel="size, relative", ylabel=f"{title}, relative", title=title)
                axes.grid(alpha=0.3, which="both")
                axes.legend(title=f"{name}: exponent")

    return draw
