"""Which recipe learns more: at equal tokens, and at equal time, over seeds, with confidence intervals.

    --tokens N     every recipe trains on N tokens (rounded to whole steps)
    --minutes M    every recipe trains for M minutes: its speed is measured in a few steps first, and the number of
                   steps follows from it, so that its schedule comes to its end within the time

Either or both. Recipes take turns seed by seed. What is compared is the last validation: bits per byte, which does not
depend on the tokenizer, where the data knows its bytes, else nats per token. The difference to the first recipe is
taken seed by seed; its interval is Student's t (`student.py`), and where that holds 0 the recipes are not
distinguishable by these seeds.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from sky_core.bench.ceilings import default_device
from sky_core.bench.defaults import record_name
from sky_core.bench.record import Record, spread
from sky_core.bench.report import Settings, bars, finish
from sky_core.bench.student import Interval, paired, pairs_needed
from sky_core.components.training import Fit
from sky_core.config import Run, read_run
from sky_core.errors import SkyError, UserError
from sky_core.run_directory import RunDirectory

CALIBRATION_STEPS = 12
UNITS = {"bits_per_byte": "bits/byte", "loss": "nats/token"}


def run(
    settings: Settings,
    recipes: Sequence[Path],
    *,
    seeds: int,
    first_seed: int,
    tokens: int | None,
    minutes: float | None,
    confidence: float,
    overrides: Sequence[str],
) -> None:
    """Train, compare and record. Raises `UserError` for less than two recipes or without a budget."""
    if len(recipes) < 2:
        raise UserError("a comparison needs two recipes at least")
    if tokens is None and minutes is None:
        raise UserError("say how long: --tokens N, --minutes M, or both")
    names = _names(recipes)
    runs = {name: read_run(path, overrides) for name, path in zip(names, recipes, strict=True)}
    batch_tokens = {name: _batch_tokens(name, one) for name, one in runs.items()}
    chosen = [first_seed + i for i in range(1 if settings.smoke else seeds)]
    name = record_name("recipe", *names, device=default_device())
    record = Record(settings.options(name), what=f"recipes {' and '.join(names)}", seeds=chosen)

    details: list[dict[str, Any]] = []
    plots: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        fixed = [*overrides, f"out={folder}"]
        budgets: dict[str, dict[str, int]] = {}
        if tokens is not None:
            budgets[f"{tokens:,} tokens"] = {name: max(1, tokens // size) for name, size in batch_tokens.items()}
        if minutes is not None:
            speeds = {name: _seconds_per_step(path, fixed) for name, path in zip(names, recipes, strict=True)}
            budgets[f"{minutes:g} minutes"] = {
                name: max(1, int(60 * minutes / seconds)) for name, seconds in speeds.items()
            }
        for budget, steps in budgets.items():
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for seed in chosen:
                for name, path in zip(names, recipes, strict=True):
                    click.echo(f"{budget}: {name}, seed {seed}, {steps[name]} steps", err=True)
                    found[name].append(_train(path, [*fixed, f"seed={seed}", *_ending(runs[name], steps[name])]))
            plots |= _measure(record, budget, found)
            notes += _verdicts(budget, found, confidence)
            details += [
                {"budget": budget, "recipe": name, "seed": seed, **one}
                for name, rows in found.items()
                for seed, one in zip(chosen, rows, strict=True)
            ]
    plot = bars(f"recipes {' and '.join(names)}", UNITS[_key(found)], plots)
    finish(record, settings, plot, notes=notes, runs=details, confidence=confidence)


def _key(found: dict[str, list[dict[str, Any]]]) -> str:
    """What all runs can be compared by."""
    return "bits_per_byte" if all("bits_per_byte" in one for rows in found.values() for one in rows) else "loss"


def _measure(record: Record, budget: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The losses of a budget beside the first recipe's; what to plot of them."""
    key = _key(found)
    values = {name: [one[key] for one in rows] for name, rows in found.items()}
    first, *others = found
    for name, rows in found.items():
        record.measure(f"{name}, {budget}", values[name], UNITS[key])
        record.measure(f"{name}, {budget}: time", [one["seconds"] for one in rows], "s")
    for name in others:
        pairs = list(zip(values[first], values[name], strict=True))
        record.measure(f"{name} - {first}, {budget}", [b - a for a, b in pairs], UNITS[key])
        record.measure(f"{name} over {first}, {budget}", [b / a for a, b in pairs], "times its loss", better="lower")
    return {f"{name}, {budget}": spread(numbers) for name, numbers in values.items()}


def _verdicts(budget: str, found: dict[str, list[dict[str, Any]]], confidence: float) -> list[str]:
    """What the seeds say of each recipe beside the first."""
    key = _key(found)
    first, *others = found
    return [
        f"{name} - {first}, {budget}, {UNITS[key]}: "
        + verdict([b[key] - a[key] for a, b in zip(found[first], found[name], strict=True)], confidence)
        for name in others
    ]


def verdict(differences: Sequence[float], confidence: float) -> str:
    """The interval of the mean difference in words, and how many seeds would tell."""
    found: Interval = paired(differences, confidence)
    if found.n == 1:
        return "one seed says nothing of the spread"
    interval = f"mean {found.mean:+.4f}, {confidence:.0%} interval {found.low:+.4f} to {found.high:+.4f}"
    if not found.holds_zero:
        return f"{interval}, {'lower' if found.mean < 0 else 'higher'}"
    needed = pairs_needed(differences, confidence)
    more = (
        f"about {needed - found.n} more seeds would tell" if needed else "more seeds than anybody will run would tell"
    )
    return f"{interval}, not distinguishable ({more})"


def _names(recipes: Sequence[Path]) -> list[str]:
    """What the recipes are called: their files' stems, or their whole paths where two share one."""
    stems = [path.stem for path in recipes]
    names = stems if len(set(stems)) == len(stems) else [path.with_suffix("").as_posix() for path in recipes]
    if len(set(names)) < len(names):
        raise UserError("a recipe is there twice; compare different files")
    return names


def _batch_tokens(name: str, run: Run) -> int:
    """Tokens of a step. Raises `UserError` for a trainer that has no such option."""
    if not isinstance(run.train, Fit):
        raise UserError(f"{name}: train.kind is {run.train.kind!r}; recipes of `fit` are compared")
    return run.train.batch_tokens


def _ending(run: Run, steps: int) -> list[str]:
    """Overrides for a run of so many steps; warm-ups and decays that are fractions follow."""
    every = run.eval.every
    return [f"train.steps={steps}", *([f"eval.every={steps}"] if every is not None and every > steps else [])]


def _seconds_per_step(path: Path, fixed: Sequence[str]) -> float:
    """The median time of a step after the first few. The schedule costs no time, and its warm-up may take more steps
    than these."""
    click.echo(f"speed of {path.stem}: {CALIBRATION_STEPS} steps", err=True)
    brief = [f"train.steps={CALIBRATION_STEPS}", "schedule=constant", "log.every=1", "eval.every=null",
             "checkpoint.every=null", "sample.every=null"]  # fmt: skip
    directory = _finished(path, [*fixed, *brief])
    times = [line["time"] for line in directory.metrics() if "loss" in line]
    shutil.rmtree(directory.path)  # its checkpoints: one comparison makes many runs
    gaps = [after - before for before, after in pairwise(times)]
    return statistics.median(gaps[len(gaps) // 3 :])


def _train(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The last evaluation of a finished run, its tokens and its time."""
    directory = _finished(path, overrides)
    evaluation = directory.info.get("evaluation") or {}
    if evaluation.get("loss") is None:
        raise SkyError(f"{path}: the run ended without a finite validation loss; there is nothing to compare")
    times = [line["time"] for line in directory.metrics()]
    numbers = {key: evaluation[key] for key in UNITS if evaluation.get(key) is not None}
    tokens = directory.info.get("tokens")
    shutil.rmtree(directory.path)
    return {**numbers, "tokens": tokens, "seconds": times[-1] - times[0]}


def _finished(path: Path, overrides: Sequence[str]) -> RunDirectory:
    from sky_core import api

    result = api.train(path, overrides)
    if result.signal == "SIGINT":
        raise KeyboardInterrupt
    if result.state != "done":
        raise SkyError(f"{path}: the run ended {result.state} ({result.reason}); there is nothing to compare")
    return RunDirectory.open(result.directory)
