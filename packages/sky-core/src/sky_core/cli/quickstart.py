"""`sky quickstart`: from nothing to a trained, evaluated and sampled model in a few minutes, on any machine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr
from importlib.resources import files
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from sky_core.cli.quiet import quiet
from sky_core.cli.uncollected import uncollected

if TYPE_CHECKING:
    from sky_core.config import Run

PROMPTS = ("The ", "If the file does not exist, ", "def __init__(self, ", "import ")

SECONDS = 90
"""What the steps may take: about two minutes with the evaluations between them, and room for a busier machine."""

FEWEST, MOST = 60, 1500
"""Bounds of the steps. Fewer teach nothing, so a slow machine takes smaller steps before it takes fewer."""

PROBE_SECONDS = 6

LOOKS = ("eval", "checkpoint", "sample")
"""Tables whose `every` says how often the run is looked at."""


@click.command()
@click.argument("overrides", nargs=-1)
def quickstart(overrides: tuple[str, ...]) -> None:
    """Train a small decoder on this Python's own documentation and sources, measure it, and sample from it.

    How fast this machine is decides how many steps fit two minutes. OVERRIDES change the run:
    sky quickstart train.steps=100 model.n_layer=2.
    """
    with uncollected():
        from sky_core import api
    from sky_core.cli.eval import measure, print_evaluation
    from sky_core.cli.train import finish
    from sky_core.config import read_run

    run_file = Path(str(files("sky_core") / "quickstart.yaml"))
    click.echo(
        "quickstart: text from this Python -> tokenizer -> two minutes of training -> evaluation -> samples\n"
        "            about three minutes in all, a little more the first time; Ctrl-C saves and stops\n"
        f"run file    {run_file}",
        err=True,
    )
    chosen = fitting(read_run(run_file, overrides), overrides)
    result = api.train(run_file, [*chosen, *overrides])
    if result.signal:
        finish(result)
    if result.state == "done":
        print_evaluation(result.evaluation)
    else:  # stopped before its last step, which is the one that evaluates
        print_evaluation(measure(str(result.directory)))
    with quiet():
        model, tokenizer = api.load(result.directory)
    for prompt in PROMPTS:
        text = api.generate(model, tokenizer, prompt, max_new_tokens=60, temperature=0.7, top_p=0.95, seed=1)
        click.secho(f"\n--- {prompt!r}", dim=True)
        click.secho(prompt, bold=True, nl=False)
        click.echo(text.rstrip())
    run = result.directory
    click.echo(
        f"\n{result.state} at step {result.step}{f' ({result.reason})' if result.reason else ''}\n"
        f"everything is in {run}: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/last\n"
        "what to type next:\n"
        f"{activation()}"
        f'  sky sample {run} --prompt "def main(" --temperature 0.8 --top-p 0.95\n'
        f"  sky eval {run}\n"
        f"  sky runs --out {run.parent}\n"
        f"  sky show {run}/config.yaml\n"
        f"  sky resume {run} train.steps={2 * result.step} train.max_minutes=null      train it twice as long\n"
        "  sky data prepare my_texts/ --out data/mine     then: sky train my_run.yaml data.path=data/mine"
    )


def activation() -> str:
    """The line that makes a shell find `sky`, where it does not: this ran from an environment that is not active."""
    activate = Path(sys.argv[0]).with_name("activate")
    return "" if shutil.which("sky") or not activate.exists() else f"  source {activate}      once in each terminal\n"


def fitting(run: Run, given: Iterable[str]) -> list[str]:
    """Overrides that make the run fit this machine: steps, their size, and thirds at which it is looked at.

    The steps are not touched when `given` sets them.
    """
    keys = {override.partition("=")[0] for override in given}
    fit: Any = run.train
    steps, tokens = fit.steps, fit.batch_tokens
    if not keys & {"train", "train.steps", "train.kind"}:
        click.echo("measuring this machine (the first time, the text is prepared too) ...", err=True)
        seconds = seconds_per_step(run)
        while "train.batch_tokens" not in keys and SECONDS / seconds < FEWEST and tokens % 2 == 0 and tokens > 512:
            tokens, seconds = tokens // 2, seconds / 2
        steps = min(max(int(SECONDS / seconds), FEWEST), MOST)
        minutes = steps * seconds / 60
        click.echo(f"this machine: {tokens / seconds:,.0f} tokens/s: {steps} steps, {minutes:.1f} minutes", err=True)
    third = -(-steps // 3)
    looks = [f"{table}.every={third}" for table in LOOKS]
    return [f"train.steps={steps}", f"train.batch_tokens={tokens}", f"log.every={max(1, steps // 30)}", *looks]


def seconds_per_step(run: Run) -> float:
    """How long a step of this run takes on this machine, by training for a few seconds what is then thrown away."""
    from sky_core import api
    from sky_core.run_directory import RunDirectory

    fit: Any = run.train
    with TemporaryDirectory() as folder:
        probe = run.model_copy(
            update={
                "out": folder,
                "train": fit.model_copy(update={"steps": 10**6, "max_minutes": PROBE_SECONDS / 60}),
                "log": run.log.model_copy(update={"every": 1, "tensorboard": False}),
                **{table: getattr(run, table).model_copy(update={"every": None}) for table in LOOKS},
            }
        )
        with redirect_stderr(StringIO()):
            result = api.train(probe)
        if result.signal:
            raise KeyboardInterrupt
        lines = RunDirectory(result.directory).metrics()
    between = [after["time"] - before["time"] for before, after in pairwise(lines)]
    # The first step warms up; where it is the only one, it has to do.
    return max(median(between) if between else lines[0]["seconds_per_step"], 1e-4)
