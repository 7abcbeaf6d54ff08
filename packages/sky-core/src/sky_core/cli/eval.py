"""`sky eval`: the loss of a trained model on its whole validation split."""

from __future__ import annotations

from collections.abc import Mapping

import click

LABELS = {
    "loss": ("nats/token", ".4f"),
    "perplexity": ("perplexity", ".4f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "tokens": ("tokens", ",.0f"),
    "bytes": ("bytes", ",.0f"),
}
"""How the numbers of the loss are shown; those of other evaluations keep their names."""


@click.command(name="eval")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def evaluate(run: str, as_json: bool) -> None:
    """Measure RUN (a run directory, a name or unique prefix, @last, @best, or name@step) on its validation split.

    Prints nats per token, perplexity and bits per byte, then what the run file's other evaluations say, and adds all
    of it to the run's events.jsonl.
    """
    import json
    from contextlib import nullcontext

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from sky_core.api import load
    from sky_core.components.evaluation import LossEval
    from sky_core.errors import DataError
    from sky_core.run_directory import find_run

    directory, checkpoint = find_run(run)
    model, tokenizer = load(run)
    config = directory.config
    dataset = config.data.build(config.seed, config.tokenizer)
    if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{run}: the data was made with another tokenizer ({dataset.tokenizer.fingerprint}) than the model's"
            f" ({tokenizer.fingerprint}); prepare it again with the run's tokenizer"
        )
    loss = next((task for task in config.eval.tasks if isinstance(task, LossEval)), LossEval())
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("evaluating")

        def progress(tokens: int) -> None:
            bar.update(line, description=f"evaluating: {tokens:,} tokens")

        results = loss.build()(model, tokenizer, dataset, nullcontext, progress=progress)
        for task in config.eval.tasks:
            if not isinstance(task, LossEval):
                bar.update(line, description=f"evaluating: {task.kind}")
                results |= task.build()(model, tokenizer, dataset, nullcontext)

    folder = (directory.path / "checkpoints" / checkpoint).resolve()
    step = int(folder.name.removeprefix("step_"))
    directory.append_event({"event": "eval", "step": step, "checkpoint": folder.name, **results})
    if as_json:
        click.echo(json.dumps(results))
        return
    print_evaluation(results)


def print_evaluation(results: Mapping[str, float]) -> None:
    """A line for each number."""
    for name, value in results.items():
        label, form = LABELS.get(name, (name, ".4f"))
        click.echo(f"{label:<16}{value:>16{form}}")
