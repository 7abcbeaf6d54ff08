"""`sky runs`: list and compare runs. Reads run directories only; torch-free."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from sky_core.run_directory import RunDirectory, list_runs
from sky_core.training.progress import duration, integer, quantity


def _number(value: float) -> str:
    return f"{value:.4f}" if value < 100 else quantity(value)


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "state": ("state", str),
    "step": ("step", integer),
    "loss": ("val loss", _number),
    "bits_per_byte": ("bits/byte", _number),
    "train_loss": ("train loss", _number),
    "tokens_per_second": ("tok/s", quantity),
    "parameters": ("params", quantity),
    "tokens": ("tokens", quantity),
    "minutes": ("time", lambda minutes: duration(60 * minutes)),
}
"""Key of a summary -> (head of its column, how a value is written)."""


@click.command()
@click.argument("names", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), help="Folder of run directories.")
@click.option("--sort", type=click.Choice(["created", *COLUMNS]), default="created", help="Column to sort by.")
@click.option("--tag", help="Only runs with this tag.")
@click.option("--diff", is_flag=True, help="Show in which options the runs differ.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def runs(names: tuple[str, ...], out: Path, sort: str, tag: str | None, diff: bool, as_json: bool) -> None:
    """List the runs of a folder, or compare NAMES (ids, names, prefixes): loss, bits per byte, tokens/s, parameters."""
    rows = [summary(run) for run in _chosen(names, out) if tag is None or tag in run.info.get("tags", [])]
    rows.sort(key=lambda row: (row[sort] is None, row[sort]))
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        click.echo(f"no runs in {out}/")
        return
    heads = [head for head, _ in COLUMNS.values()]
    table = [["run", *heads], *([row["id"], *(_text(row, key) for key in COLUMNS)] for row in rows)]
    why = ["", *(row["reason"] if row["state"] != "done" else "" for row in rows)]
    width = shutil.get_terminal_size((120, 24)).columns
    for line, reason in zip(_aligned(table), why, strict=True):
        click.echo(line)
        if reason:
            reason = " ".join(reason.split())
            click.echo(f"  why: {reason if len(reason) <= width - 7 else reason[: width - 8] + '…'}")
    if diff:
        click.echo()
        found = [[path, *values] for path, values in differences(rows)]
        for line in _aligned([["", *(row["id"] for row in rows)], *found]) if found else ["no differences"]:
            click.echo(line)


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def _chosen(names: tuple[str, ...], out: Path) -> list[RunDirectory]:
    from sky_core.run_directory import find_run

    return [find_run(name, out)[0] for name in names] if names else list_runs(out)


def summary(run: RunDirectory) -> dict[str, Any]:
    """What a table of runs shows of one run; None where it is not known yet."""
    info = run.info
    evaluation = info.get("evaluation") or {}
    return {
        "id": run.path.name,
        "path": str(run.path),
        "created": info.get("created"),
        "state": run.state,
        "step": info.get("step"),
        "steps": info.get("steps"),
        "loss": evaluation.get("loss"),
        "bits_per_byte": evaluation.get("bits_per_byte"),
        "train_loss": info.get("train_loss"),
        "tokens_per_second": info.get("tokens_per_second"),
        "parameters": info.get("parameters"),
        "tokens": info.get("tokens"),
        "minutes": info.get("minutes"),
        "tags": info.get("tags", []),
        "reason": info.get("reason", ""),
    }


def differences(rows: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(path, value in each run) of every option in which the runs' resolved files differ.

    A part that is of different kinds is one difference, whatever its options.
    """
    from sky_core.yaml_file import read_yaml

    return list(_differing("", [read_yaml(Path(row["path"]) / "config.yaml")[0] for row in rows]))


def _differing(path: str, nodes: list[Any]) -> Iterator[tuple[str, list[str]]]:
    if all(node == nodes[0] for node in nodes):
        return
    tables = all(isinstance(node, dict) for node in nodes) and len({node.get("kind") for node in nodes}) == 1
    lists = all(isinstance(node, list) for node in nodes) and len({len(node) for node in nodes}) == 1
    if tables:
        keys: Iterable[Any] = dict.fromkeys(key for node in nodes for key in node)
    elif lists:
        keys = range(len(nodes[0]))
    else:
        yield path, [_told(node) for node in nodes]
        return
    for key in keys:
        children = [node[key] if lists else node.get(key, ABSENT) for node in nodes]
        yield from _differing(f"{path}.{key}".lstrip("."), children)


ABSENT = object()
"""Stands where a run has no such key."""


def _told(node: Any) -> str:
    """A value in one word where it can be: a part is its kind."""
    if node is ABSENT:
        return "-"
    if isinstance(node, dict) and "kind" in node:
        return str(node["kind"])
    if isinstance(node, list):
        return f"[{', '.join(map(_told, node))}]"
    return json.dumps(node, ensure_ascii=False)


def _text(row: dict[str, Any], key: str) -> str:
    """What the table shows of a summary: `-` for what is not known, a step with the steps that were asked for."""
    if row[key] is None:
        return "-"
    text = COLUMNS[key][1](row[key])
    return f"{text}/{integer(row['steps'])}" if key == "step" and row["steps"] else text
