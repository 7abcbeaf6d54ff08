"""`sky eval`: what a trained model is worth, as a table with standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from sky_core.cli.quiet import quiet

if TYPE_CHECKING:
    from sky_core.slots import Eval


def _words(_context: click.Context, _parameter: click.Parameter, given: Sequence[str]) -> list[str]:
    return [word for words in given for word in words.split(",") if word]


@click.command(name="eval")
@click.argument("run")
@click.option("--task", "tasks", multiple=True, callback=_words, help="Only these, by kind or name: loss,last_word,...")
@click.option("--data", multiple=True, help="File for --task (several: repeat); alone: its bits per byte.")
@click.option("--lm-eval", "lm_eval", multiple=True, callback=_words, help="Tasks of lm-evaluation-harness.")
@click.option("--include-path", help="Folder with YAML files of further --lm-eval tasks.")
@click.option("--quantize", metavar="FORMAT", help="With weights in fewer bits (int8, int4); only printed, not noted.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def evaluate(
    run: str,
    tasks: list[str],
    data: tuple[str, ...],
    lm_eval: list[str],
    include_path: str | None,
    quantize: str | None,
    as_json: bool,
) -> None:
    """Measure RUN (a run directory, a name or unique prefix, @last, @best, or name@step; or hf:DIR).

    Without options: the loss on the whole validation split, then the run file's other evaluations. Everything is
    computed on this machine's best device in the precision of training, and added to the run's events.jsonl and to
    evals/<checkpoint>.json and .md.

    \b
    sky eval @last --task last_word --data book.txt
    sky eval @last --data web.txt --data code.jsonl
    sky eval @last --lm-eval lambada_openai
    """
    import json

    results = measure(run, tasks=tasks, data=data, lm_eval=lm_eval, include_path=include_path, quantize=quantize)
    if as_json:
        click.echo(json.dumps(results))
        return
    print_evaluation(results)


def measure(
    run: str,
    *,
    tasks: Sequence[str] = (),
    data: Sequence[str] = (),
    lm_eval: Sequence[str] = (),
    include_path: str | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """The chosen evaluations of a run (see `choose`), on the device and in the precision of its training; noted in its
    events and its table, unless they are those of its weights in another format (`quantize`).

    Raises `DataError` when the data was made with another tokenizer than the model's.
    """
    import re

    import torch
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from sky_core.api import load
    from sky_core.components.evaluation import LossEval
    from sky_core.errors import DataError, UserError
    from sky_core.eval.table import write_table
    from sky_core.quantization import quantize_
    from sky_core.run_directory import find_run
    from sky_core.training.precision import resolve_precision

    # A plugin's scheme (hf:DIR) names a model without a run directory.
    directory, checkpoint = (None, "") if re.match(r"(?!run:)[a-z]+:", run) else find_run(run.removeprefix("run:"))
    config = None if directory is None else directory.config
    with quiet():
        model, tokenizer = load(run)
    if quantize is not None:
        quantize_(model, quantize)
    chosen = choose(None if config is None else config.eval.tasks, tasks, data, lm_eval, include_path)
    dataset = None
    if any(task.needs_data for task in chosen):
        if config is None:
            raise UserError(
                f"{run}: this model has no run directory and so no data; give --task with --data, or --lm-eval"
            )
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
    wanted = "auto" if config is None else getattr(config.train, "precision", "fp32")
    precision = resolve_precision(wanted, device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    console = Console(stderr=True)
    results: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("evaluating")

        def progress(tokens: int) -> None:
            bar.update(line, description=f"evaluating: {tokens:,} tokens")

        for task in chosen:
            bar.update(line, description=f"evaluating: {task.kind}")
            more = {"progress": progress} if isinstance(task, LossEval) else {}
            found = task.build()(model, tokenizer, dataset, autocast, **more)
            if twice := results.keys() & found.keys():
                raise UserError(f"two evaluations report {min(twice)!r}; give one of them another `name`")
            results |= found
    results["precision"] = precision if quantize is None else f"{precision}, {quantize} weights"

    if directory is not None and quantize is None:
        folder = (directory.path / "checkpoints" / checkpoint).resolve()
        step = int(folder.name.removeprefix("step_"))
        directory.append_event({"event": "eval", "step": step, "checkpoint": folder.name, **results})
        click.echo(f"table       {write_table(directory.path, folder, results)}", err=True)
    return results


def choose(
    configured: Sequence[Eval] | None,
    names: Sequence[str],
    data: Sequence[str],
    lm_eval: Sequence[str],
    include_path: str | None,
) -> list[Eval]:
    """What is to be measured: by default the loss and all that is `configured`; else the kinds or names asked for, as
    configured or, with `data`, on those files (`domains` when none is named); and tasks of lm-evaluation-harness.

    Raises `UserError` for what does not exist or cannot be used like that.
    """
    from sky_core.component import active_catalog, closest
    from sky_core.components.evaluation import LmEval, LossEval
    from sky_core.errors import UserError

    configured = configured or ()
    chosen: list[Eval] = []
    if include_path is not None and not lm_eval:
        raise UserError("--include-path holds tasks for --lm-eval; say which: --lm-eval TASK")
    if not names and not data and not lm_eval:
        losses = [task for task in configured if isinstance(task, LossEval)] or [LossEval()]
        return [*losses[:1], *(task for task in configured if not isinstance(task, LossEval))]
    kinds: Mapping[str, Any] = active_catalog()["eval"]
    for name in names or (["domains"] if data else []):
        as_configured = [task for task in configured if name in (task.kind, getattr(task, "name", task.kind))]
        if as_configured and not data:
            chosen += as_configured
            continue
        if name not in kinds:
            known = {*kinds, *(getattr(task, "name", task.kind) for task in configured)}
            raise UserError(f"no evaluation called {name!r} (have: {', '.join(sorted(known))}){closest(name, known)}")
        kind = kinds[name]
        if data and "path" not in kind.model_fields:
            raise UserError(
                f"the evaluation {name!r} takes no --data; for bits per byte of a file: --task domains --data"
            )
        needed = {key for key, field in kind.model_fields.items() if field.is_required()} - (
            {"path"} if data else set()
        )
        if needed:
            how = (
                "give --data FILE" if needed == {"path"} else f"put it into eval.tasks with {', '.join(sorted(needed))}"
            )
            raise UserError(f"the run file does not configure the evaluation {name!r}; {how}")
        chosen.append(kind(path=data[0] if len(data) == 1 else list(data)) if data else kind())
    if lm_eval:
        chosen.append(LmEval(tasks=list(lm_eval), include_path=include_path))
    return chosen


def print_evaluation(results: Mapping[str, Any]) -> None:
    """The table on stdout."""
    from sky_core.eval.table import as_text, lines_of

    click.echo(as_text(lines_of(results)))
    if "precision" in results:
        click.echo(f"precision   {results['precision']}")
