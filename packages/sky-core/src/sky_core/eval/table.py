"""The numbers of an evaluation as a table: task, metric, value, standard error, number of items.

Evaluations give flat names (`task/metric`, `task/part/metric`; the validation loss just `metric`); `..._stderr` belongs
to the metric it is named after, `items` or `sequences` say what it was taken over. Beside events.jsonl a run keeps one
table per checkpoint, evals/step_000500.json and .md. Evaluating a checkpoint again replaces the tasks (and parts of
them) that are measured again and keeps the others; a checkpoint that was trained anew starts a new table. Imports no
torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sky_core.files import sha256, write_atomic, write_json

UNITS = {"loss": "nats/token", "bits_per_byte": "bits/byte"}
"""How metrics are headed; all others keep their names."""

COUNTS = ("items", "sequences")
"""What standard errors are taken over."""

SIZES = ("tokens", "bytes")

HEADS = ("task", "metric", "value", "± s.e.", "n")


class Line(NamedTuple):
    """One number. `stderr` and `n` are None where there is none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int | None


def lines_of(results: Mapping[str, Any]) -> list[Line]:
    """A line for each metric of `results`, in order; words (the precision) are left out."""
    lines = []
    for name, value in results.items():
        task, slash, metric = name.rpartition("/")
        if metric in COUNTS or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        n = next((results[task + slash + count] for count in COUNTS if task + slash + count in results), None)
        sized = slash or metric in (*UNITS, "perplexity", *SIZES)
        lines.append(
            Line(
                task or ("validation" if sized else ""),
                UNITS.get(metric, metric),
                value,
                results.get(f"{name}_stderr"),
                None if n is None or not sized or metric in SIZES else int(n),
            )
        )
    return lines


def as_text(lines: Sequence[Line]) -> str:
    """The table in aligned columns, numbers to the right."""
    table = [HEADS, *map(_cells, lines)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(HEADS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    )


def as_markdown(lines: Sequence[Line]) -> str:
    rows = [HEADS, ("---", "---", "---:", "---:", "---:"), *map(_cells, lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def write_table(run: Path, checkpoint: Path, results: Mapping[str, Any]) -> Path:
    """Write or renew the table of `checkpoint` (a folder of the run); returns the path of the Markdown file."""
    folder = run / "evals"
    folder.mkdir(exist_ok=True)
    path = folder / f"{checkpoint.name}.json"
    manifest = sha256(checkpoint / "MANIFEST.json")
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if before.get("manifest_sha256") == manifest:
        again = {_task(name) for name in results}
        results = {name: value for name, value in before["results"].items() if _task(name) not in again} | dict(results)
    lines = lines_of({name: float("nan") if value is None else value for name, value in results.items()})
    write_json(
        path,
        {
            "checkpoint": checkpoint.name,
            "manifest_sha256": manifest,
            "results": dict(results),
            "table": [line._asdict() for line in lines],
        },
    )
    title = f"# {run.resolve().name}, {checkpoint.name}\n\n"
    precision = f"\nComputed in {results['precision']}.\n" if "precision" in results else ""
    write_atomic(path.with_suffix(".md"), title + as_markdown(lines) + precision)
    return path.with_suffix(".md")


def _task(name: str) -> str:
    """What is measured together: a task or part of one; a metric of no task with its standard error."""
    return name.rpartition("/")[0] or name.removesuffix("_stderr")


def _cells(line: Line) -> tuple[str, ...]:
    value = f"{line.value:,.0f}" if line.metric in SIZES else _number(line.value)
    stderr = "" if line.stderr is None else _number(line.stderr)
    return line.task, line.metric, value, stderr, "" if line.n is None else f"{line.n:,}"


def _number(value: float) -> str:
    return f"{value:,.4f}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"
