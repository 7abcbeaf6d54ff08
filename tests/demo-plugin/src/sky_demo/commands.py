"""`sky demo`: what this plugin adds to the command line. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sky_core.errors import UserError
from sky_core.run_directory import find_run

BARS = "▁▂▃▄▅▆▇█"


@click.group()
def demo() -> None:
    """Commands of the demonstration plugin."""


@demo.command()
@click.argument("run")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), help="Folder of run directories.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def curve(run: str, out: Path, as_json: bool) -> None:
    """Draw the training loss of RUN (a directory, a name, @last) in one line."""
    directory, _ = find_run(run, out)
    points = [(line["step"], line["loss"]) for line in directory.metrics() if "loss" in line]
    if not points:
        raise UserError(f"{directory.path}: no loss was logged yet; log.every says how often it is")
    if as_json:
        click.echo(json.dumps([{"step": step, "loss": loss} for step, loss in points]))
        return
    losses = [loss for _, loss in points]
    click.echo(f"{losses[0]:.3f} {bars(losses)} {losses[-1]:.3f}  steps {points[0][0]} to {points[-1][0]}")


def bars(values: list[float]) -> str:
    """One block per value, the lowest empty and the highest full."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)
