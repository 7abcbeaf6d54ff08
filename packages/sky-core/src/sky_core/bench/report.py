"""How a benchmark ends: its record as JSON, a Markdown table and a plot beside it, and held to an older record."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from sky_core.bench.compare import fallen
from sky_core.bench.record import Options, Record, shown, target
from sky_core.errors import CheckFailed, UserError
from sky_core.files import write_atomic

HEAD = ["| | measured | range | target | | for comparison |", "|---|--:|---|---|---|---|"]


@dataclass(frozen=True)
class Settings:
    """What every sub-command of `sky bench` is told: where the record goes, and which one it is held to."""

    out: Path | None = None
    name: str | None = None
    smoke: bool = False
    allow_dirty: bool = False
    compare: Path | None = None

    def options(self, name: str) -> Options:
        """The options of a record that is called `name` unless the user said otherwise. Raises `UserError` when the
        record to compare with is none."""
        if self.compare is not None:
            read(self.compare)
        return Options(self.name or name, self.out, self.smoke, self.allow_dirty)


def read(path: Path) -> dict[str, Any]:
    """A record. Raises `UserError` for a file that holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such record") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); measure again") from None
    if not isinstance(data, dict) or not isinstance(data.get("measures"), list):
        raise UserError(f"{path}: no record of a benchmark (it has no measures)")
    return data


def row(measure: dict[str, Any]) -> str:
    """A measure as a row of a Markdown table under `HEAD`."""
    met = {True: "met", False: "**not met**", None: ""}[measure.get("met")]
    several = measure["n"] > 1
    spread = f"{shown(measure['low'])} to {shown(measure['high'])} (n = {measure['n']})" if several else ""
    peer = f"{measure['peer']['name']}: {shown(measure['peer']['value'])}" if "peer" in measure else ""
    value = f"{shown(measure['value'])} {measure['unit']}".strip()
    return f"| {' | '.join([measure['what'], value, spread, target(measure), met, peer])} |"


def origin(record: dict[str, Any]) -> str:
    """Machine, versions, commit, date and command of a record in one line."""
    here, versions = record["machine"], record["versions"]
    parts = [f"{here['cpu']}, {here['cores']} cores", *filter(None, [here.get("gpu")])]
    parts += [f"Python {versions['python']}"]
    parts += [f"{name} {number}" for name, number in versions.items() if number and name not in QUIET]
    parts.append(f"commit {str(record['commit'])[:9]}" if record["commit"] else f"sky-core {versions['sky-core']}")
    dirty = " **with uncommitted changes**" if record["dirty"] else ""
    return f"{record['name']}: {', '.join(parts)}{dirty}, {record['date'][:10]}; `{record['command']}`"


QUIET = ("python", "numpy", "sky-core")
"""Versions that every record holds and a line about it need not say."""


def markdown(data: dict[str, Any]) -> str:
    """A record for a reader."""
    notes = [line for note in data.get("notes", []) for line in (note, "")]
    table = [*HEAD, *map(row, data["measures"])]
    return "\n".join([f"**{data['what']}**", "", *table, "", *notes, origin(data), ""])


def finish(record: Record, settings: Settings, draw: Callable[[Path], None] | None = None, **details: Any) -> None:
    """Write and print the record; `draw(path)` makes its plot, where matplotlib is installed. Of the `details`, `notes`
    are lines below the table.

    Raises `CheckFailed` when a ratio fell since the record that the user compares with.
    """
    base = read(settings.compare) if settings.compare is not None else None  # which may be what is now overwritten
    data = record.write(**details)
    text = markdown(data)
    click.echo(text, nl=False)
    if record.path is not None:
        write_atomic(record.path.with_suffix(".md"), text)
        if draw is not None and importlib.util.find_spec("matplotlib") is None:
            click.echo("no plot: matplotlib is not installed", err=True)
        elif draw is not None:
            draw(record.path.with_suffix(".svg"))
    record.finish()
    if base is not None:
        check(data, base, str(settings.compare))


def check(new: dict[str, Any], base: dict[str, Any], name: str) -> None:
    """Say which ratios of `new` fell since `base`.

    Raises `CheckFailed` when one did, `UserError` when the two have none in common.
    """
    lines, common = fallen(new, base)
    if not common:
        raise UserError(f"{name}: it has no ratio in common with this record; compare records of one benchmark")
    for one in lines:
        click.echo(one)
    if lines:
        raise CheckFailed(f"{len(lines)} of {common} ratios fell since {name} by more than their spread")
    click.echo(f"none of {common} ratios fell since {name} by more than its spread")


def turns(rounds: int, label: str = "") -> Callable[[str, int], None]:
    """Tells on stderr whose turn it is (`timing.interleave`)."""

    def tell(name: str, turn: int) -> None:
        click.echo(f"{label}round {turn}/{rounds} {name}" if turn else f"{label}warm-up {name}", err=True)

    return tell


def bars(title: str, unit: str, measures: Mapping[str, Mapping[str, Any]]) -> Callable[[Path], None]:
    """A plot of measures side by side, medians with their lowest and highest."""

    def draw(path: Path) -> None:
        with figure(path, (7, 1.2 + 0.4 * len(measures))) as axes:
            values = [measure["value"] for measure in measures.values()]
            low = [measure["value"] - measure["low"] for measure in measures.values()]
            high = [measure["high"] - measure["value"] for measure in measures.values()]
            axes.barh(list(measures), values, xerr=[low, high], capsize=3)
            axes.invert_yaxis()
            axes.set(xlabel=unit, title=title)
            axes.grid(axis="x", alpha=0.3)

    return draw


class figure:
    """A picture that is saved at the end; the same numbers give the same file."""

    def __init__(self, path: Path, size: tuple[float, float], columns: int = 1) -> None:
        self.path, self.size, self.columns = path, size, columns

    def __enter__(self) -> Any:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        matplotlib.rcParams["svg.hashsalt"] = self.path.stem
        self.figure, axes = plt.subplots(1, self.columns, figsize=self.size, layout="constrained", squeeze=False)
        return axes[0][0] if self.columns == 1 else axes[0]

    def __exit__(self, *exception: object) -> None:
        import matplotlib.pyplot as plt

        if exception[0] is None:
            self.figure.savefig(self.path, dpi=150, metadata={"Date": None})
        plt.close(self.figure)
