"""`sky runs`: list and compare runs. Reads run directories only; torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sky_core.run_directory import RunDirectory, list_runs

COLUMNS = {
    "state": "state",
    "step": "step",
    "loss": "val loss",
    "bits_per_byte": "bits/byte",
    "tokens_per_second": "tokens/s",
    "parameters": "parameters",
    "tokens": "tokens seen",
    "minutes": "minutes",
}


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
    table = [["run", *COLUMNS.values()], *([row["id"], *(_text(row[key]) for key in COLUMNS)] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if diff:
        click.echo()
        for path, values in differences(rows):
            click.echo(f"{path}: {'  |  '.join(values)}")


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
        "loss": evaluation.get("loss"),
        "bits_per_byte": evaluation.get("bits_per_byte"),
        "tokens_per_second": info.get("tokens_per_second"),
        "parameters": info.get("parameters"),
        "tokens": info.get("tokens"),
        "minutes": info.get("minutes"),
        "tags": info.get("tags", []),
        "reason": info.get("reason", ""),
    }


def differences(rows: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(path, value in each run) of every option in which the runs' resolved files differ."""
    from sky_core.yaml_file import read_yaml

    flat = [_flat(read_yaml(Path(row["path"]) / "config.yaml")[0]) for row in rows]
    paths = dict.fromkeys(path for options in flat for path in options)
    table = [(path, [json.dumps(options.get(path)) for options in flat]) for path in paths]
    return [(path, values) for path, values in table if len(set(values)) > 1]


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {
        key: value for name, child in node.items() for key, value in _flat(child, f"{path}.{name}".lstrip(".")).items()
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.4f}"
        if isinstance(value, float) and value < 100
        else f"{value:,.0f}"
        if isinstance(value, int | float)
        else str(value)
    )
