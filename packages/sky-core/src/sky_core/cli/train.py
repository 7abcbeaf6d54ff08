"""`sky train` and `sky resume`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from sky_core.cli.uncollected import uncollected

if TYPE_CHECKING:
    from sky_core.training.trainer import Result


@click.command()
@click.argument("run_file", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(run_file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train RUN_FILE in a new run directory. OVERRIDES are dotted: model.n_layer=6 optimizer.lr=3e-3."""
    with uncollected():
        from sky_core import api

    finish(api.train(run_file, overrides), as_json=as_json)


@click.command()
@click.argument("run")
@click.argument("overrides", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def resume(run: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Continue RUN (a directory, name, unique prefix, @last, name@step) from its last checkpoint, exactly.

    OVERRIDES change the run file: train.steps=4000 for a longer run.
    """
    with uncollected():
        from sky_core import api

    finish(api.resume(run, overrides), as_json=as_json)


def finish(result: Result, *, as_json: bool = False) -> None:
    """Print how a run ended and what to type next; exit with 130 when the user interrupted it."""
    if as_json:
        click.echo(json.dumps(asdict(result) | {"directory": str(result.directory)}))
    else:
        because = f" ({result.reason})" if result.reason else ""
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in result.evaluation.items() if name in SHOWN)
        click.echo(f"{result.state} at step {result.step}{because}{'; validation: ' + numbers if numbers else ''}")
        click.echo(f"run      {result.directory}")
        if result.state == "stopped":
            click.echo(f"resume   sky resume {result.directory}")
        click.echo(f'sample   sky sample {result.directory} --prompt "..."')
    sys.exit(130 if result.signal == "SIGINT" else 0)


SHOWN = ("loss", "perplexity", "bits_per_byte")
"""The numbers of an evaluation that are shown in one line."""
