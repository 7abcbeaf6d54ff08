"""`sky eval`: the loss of a trained model on its whole validation split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from sky_core.cli.quiet import quiet

LABELS = {
    "loss": ("nats/token", ".4f"),
    "perplexity": ("perplexity", ".4f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "tokens": ("tokens", ",.0f"),
    "bytes": ("bytes", ",.0f"),
    "precision": ("precision", ""),
}
"""How the numbers of the loss are shown; those of other evaluations keep their names."""


@click.command(name="eval")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def evaluate(run: str, as_json: bool) -> None:
    """Measure RUN (a run directory, a name or unique prefix, @last, @best, or name@step) on its validation split.

    Prints nats per token, perplexity and bits per byte, then what the run file's other evaluations say, and the
    precision they were computed in, which is that of training; adds all of it to the run's events.jsonl.
    """
    import json

    results = measure(run)
    if as_json:
        click.echo(json.dumps(results))
        return
    print_evaluation(results)


def measure(run: str) -> dict[str, Any]:
    """The evaluations of a run's file, on the device and in the precision of its training, noted in its events.

    Raises `DataError` when the data was made with another tokenizer than the model's.
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from sky_core.api import load
    from sky_core.components.evaluation import LossEval
    from sky_core.errors import DataError
    from sky_core.run_directory import find_run
    from sky_core.training.precision import resolve_precision

    directory, checkpoint = find_run(run)
    with quiet():
        model, tokenizer = load(run)
    config = directory.config
    dataset = config.data.build(config.seed, config.tokenizer)
    if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{run}: the data was made with another tokenizer ({dataset.tokenizer.fingerprint}) than the model's"
            f" ({tokenizer.fingerprint}); prepare it again with the run's tokenizer"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for module in (model, *(attached.module for attached in model.adapters)):
        module.to(device)
    # Trainers of plugins need not have a precision of their own.
    precision = resolve_precision(getattr(config.train, "precision", "fp32"), device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    loss = next((task for task in config.eval.tasks if isinstance(task, LossEval)), LossEval())
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("evaluating")

        def progress(tokens: int) -> None:
            bar.update(line, description=f"evaluating: {tokens:,} tokens")

        results: dict[str, Any] = loss.build()(model, tokenizer, dataset, autocast, progress=progress)
        for task in config.eval.tasks:
            if not isinstance(task, LossEval):
                bar.update(line, description=f"evaluating: {task.kind}")
                results |= task.build()(model, tokenizer, dataset, autocast)
    results["precision"] = precision

    folder = (directory.path / "checkpoints" / checkpoint).resolve()
    step = int(folder.name.removeprefix("step_"))
    directory.append_event({"event": "eval", "step": step, "checkpoint": folder.name, **results})
    return results


def print_evaluation(results: Mapping[str, Any]) -> None:
    """A line for each number."""
    for name, value in results.items():
        label, form = LABELS.get(name, (name, ".4f"))
        click.echo(f"{label:<16}{value:>16{form}}")
