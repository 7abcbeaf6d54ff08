"""`sky show`, `sky check` and `sky schema`: a run file resolved, checked, and described for editors.

Only `sky show` without `--no-build` imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sky_core.cli.implementation import implementation
from sky_core.cli.quiet import quiet
from sky_core.component import Component, Schema
from sky_core.config import Run, read_run, run_json_schema

if TYPE_CHECKING:
    from rich.text import Text
    from torch import nn

BYTES_PER_PARAMETER = 16
"""fp32 weight, gradient and two moments of AdamW; activations come on top."""

PIPED_WIDTH = 100
"""Columns of the text where there is no terminal to ask."""


@click.command()
@click.argument("run_file", type=click.Path())
@click.argument("overrides", nargs=-1)
def check(run_file: str, overrides: tuple[str, ...]) -> None:
    """Check RUN_FILE: keys, types, ranges, plugins. Every problem is reported at once; exit code 2 if there is one."""
    run = read_run(run_file, overrides)
    click.echo(f"{run_file}: fine ({sum(1 for _ in components(run))} components)")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Write to this file instead of stdout.")
def schema(out: Path | None) -> None:
    """Print the JSON Schema of run files with everything that the installed plugins offer.

    For completion in editors: sky schema --out .sky/schema.json, and as the first line of a run file
    `# yaml-language-server: $schema=.sky/schema.json`.
    """
    text = json.dumps(run_json_schema(), indent=1)
    if out is None:
        click.echo(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")
    click.echo(f"wrote {out}")


@click.command()
@click.argument("run_file", type=click.Path())
@click.argument("overrides", nargs=-1)
@click.option("--no-build", is_flag=True, help="Build neither data nor model: no parameter counts, and no torch.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(run_file: str, overrides: tuple[str, ...], no_build: bool, as_json: bool) -> None:
    """Show RUN_FILE resolved: every slot, the class that fills it, where its code is, its options and its paper."""
    run = read_run(run_file, overrides)
    parts = list(components(run))
    rows = [_row(path, component) for path, component in parts]
    sizes: dict[str, Any] = {}
    if not no_build:
        if any(component.slot == "dataset" and component.kind == "text" for _, component in parts):
            told = "data of kind text: prepared, and its tokenizer trained, if this was not done yet"
            click.echo(f"{told} (--no-build leaves that out)", err=True)
        with quiet():
            sizes = measure(run, rows)
    if as_json:
        click.echo(json.dumps({"run": run.as_dict(), "components": rows, "model": sizes}, indent=1))
    else:
        _print(run, rows, {path: component.model_fields_set for path, component in parts}, sizes)


def components(table: Schema, path: str = "") -> Iterator[tuple[str, Component]]:
    """Every component of a run with its path, depth first."""
    for name in type(table).model_fields:
        value = getattr(table, name)
        for index, item in enumerate(value if isinstance(value, list | tuple) else [value]):
            here = f"{path}{name}.{index}" if isinstance(value, list | tuple) and len(value) > 1 else f"{path}{name}"
            if isinstance(item, Component):
                yield here, item
            if isinstance(item, Schema):
                yield from components(item, f"{here}.")


def _row(path: str, component: Component) -> dict[str, Any]:
    name, file, line = implementation(type(component))
    return {
        "path": path,
        "kind": component.kind,
        "class": name,
        "where": f"{file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}:{line}",
        "options": _options(component),
        "summary": component.summary(),
        "paper": component.paper,
        "parameters": None,
    }


def _options(table: Schema) -> dict[str, Any]:
    """The options of a table that are no parts or tables themselves, nor slots that stay empty."""

    def part(value: Any) -> bool:
        items = value if isinstance(value, tuple | list) else [value]
        return value == (None,) or any(isinstance(item, Schema) for item in items)

    return {key: value for key, value in table if not part(value)}


# ------------------------------------------------------------------------------------------------------------- sizes


def measure(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the run's model and data amount to; the model is built without memory for its weights.

    Fills in the `parameters` of the rows: all of the model's, and of each part what no part inside of it holds.
    """
    import torch

    dataset = run.data.build(run.seed, run.tokenizer)
    with torch.device("meta"):
        model = run.model.build(dataset.tokenizer.vocab_size)
    parts = [row for row in rows if row["path"].startswith("model.")]
    classes = {row["class"] for row in parts}
    stateful = [module for module in model.modules() if _name(module) in classes and hasattr(module, "new_cache")]

    def cache_bytes(dtype: torch.dtype) -> int:
        states = [module.new_cache(1, model.max_length, torch.device("meta"), dtype) for module in stateful]
        return sum(tensor.nbytes for state in states for tensor in state.tensors().values()) // model.max_length

    counts = _parameters_by_class(model, classes)
    for row in parts:
        same = [other for other in parts if other["class"] == row["class"]]
        # Tiled over the depth, parts of one class take turns.
        modules = counts.get(row["class"], [])[next(i for i, one in enumerate(same) if one is row) :: len(same)]
        row["parameters"] = sum(modules) if modules else None
    count = model.n_parameters()
    next(row for row in rows if row["path"] == "model")["parameters"] = count["total"]
    tokenizer = dataset.tokenizer
    return {
        **{f"parameters.{name}": number for name, number in count.items()},
        "vocabulary": tokenizer.vocab_size,
        "tokenizer": {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint},
        "sequence_length": dataset.sequence_length,
        "flops_per_token": model.flops_per_token(dataset.sequence_length),
        "cache_bytes_per_token": {"fp32": cache_bytes(torch.float32), "bf16": cache_bytes(torch.bfloat16)},
        "bytes_to_train": count["total"] * BYTES_PER_PARAMETER,
        **{f"data.{name}": value for name, value in dataset.describe().items()},
    }


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _parameters_by_class(model: nn.Module, classes: set[str]) -> dict[str, list[int]]:
    """Class -> how many parameters each of its modules holds, in order; one counts for the innermost around it."""
    counts: dict[str, list[int]] = {name: [] for name in classes}
    seen = set()

    def walk(module: nn.Module, owner: list[int], index: int) -> None:
        if (name := _name(module)) in counts:
            owner, index = counts[name], len(counts[name])
            owner.append(0)
        for parameter in module.parameters(recurse=False):
            owner[index] += 0 if parameter in seen else parameter.numel()
            seen.add(parameter)
        for child in module.children():
            if child not in seen:
                seen.add(child)
                walk(child, owner, index)

    walk(model, [0], 0)
    return counts


# -------------------------------------------------------------------------------------------------------------- text


def _print(run: Run, rows: list[dict[str, Any]], given: dict[str, set[str]], sizes: dict[str, Any]) -> None:
    """Aligned, as wide as the terminal; in colour where there is one, options left at their defaults dimmed."""
    from rich.console import Console
    from rich.text import Text

    from sky_core.training.progress import quantity

    console = Console(highlight=False)
    width = console.width if console.is_terminal else PIPED_WIDTH
    first = max(len(row["path"]) for row in rows) + 2
    second = max(len(row["kind"]) for row in rows) + 2

    def put(label: str, *texts: Text) -> None:
        """Texts below each other, wrapped, beside a label."""
        lines = [line for text in texts for line in text.wrap(console, max(width - first, 20))] or [Text()]
        for number, line in enumerate(lines):
            line.rstrip()
            console.print(Text.assemble((("" if number else label).ljust(first), "bold"), line), soft_wrap=True)

    def options(table: dict[str, Any], given: set[str]) -> Text:
        words = [Text(f"{key}={_value(value)}", "" if key in given else "dim") for key, value in table.items()]
        return Text(", ").join(words)

    for row in rows:
        size = f"{quantity(row['parameters'])} parameters" if row["parameters"] else ""
        head = Text.assemble((row["kind"].ljust(second), "cyan"), size.ljust(20))
        paper = Text(row["paper"], "dim")
        beside = len(head) + len(paper) <= width - first
        code = Text(f"{row['class']}  {row['where']}", "green")
        places = [code] if len(code) <= width - first else [Text(row["class"], "green"), Text(row["where"], "green")]
        put(row["path"], *([head + paper] if beside else [head, paper]))
        for place in places:  # never broken: it is there to be clicked on
            console.print(Text(" " * first) + place, soft_wrap=True)
        if row["options"]:
            put("", options(row["options"], given[row["path"]]))
    if run.tokenizer is None:
        facts = ""
        if sizes:
            own = sizes["tokenizer"]
            facts = f": {own['kind']}, {sizes['vocabulary']:,} ids, fingerprint {own['fingerprint']}"
        put("tokenizer", Text(f"the data's own{facts}"))
    tables = {"run": run, **{name: value for name, value in run if type(value).__base__ is Schema}}
    for name, table in tables.items():
        found = {key: value for key, value in _options(table).items() if value not in (None, [])}
        if found:
            put(name, options(found, table.model_fields_set))
    if sizes:
        console.print()
        for label, line in _facts(sizes):
            put(label, Text(line))


def _facts(sizes: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, line) for each size of the model and fact of its data, for people."""
    from sky_core.training.progress import memory, quantity

    count = {name: quantity(sizes[f"parameters.{name}"]) for name in ("total", "body", "embedding")}
    yield "parameters", f"{count['total']} ({count['body']} body, {count['embedding']} embedding)"
    yield "FLOPs", f"{quantity(sizes['flops_per_token'])} per token of training, {sizes['sequence_length']} at a time"
    cache = sizes["cache_bytes_per_token"]
    yield "KV cache", f"{memory(cache['fp32'])} per token in fp32, {memory(cache['bf16'])} in bf16"
    yield "memory", f"{memory(sizes['bytes_to_train'])} to train (weights, gradients, two moments); activations on top"
    yield from _described("data", {key[5:]: value for key, value in sizes.items() if key.startswith("data.")})


def _described(label: str, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A line for the plain facts of a dataset, then those of each table inside."""
    from sky_core.training.progress import quantity

    def fact(name: str, value: Any) -> str:
        if isinstance(value, bool | str):
            return f"{name} {_value(value)}"
        return f"{quantity(value)} {name}" if isinstance(value, int) else f"{name} {value:.3g}"

    plain = [fact(name, value) for name, value in facts.items() if isinstance(value, int | float | str)]
    if plain:
        yield label, ", ".join(plain)
    for name, value in facts.items():
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, dict):
                yield from _described(f"{label}.{index if isinstance(value, list) else name}", item)


def _value(value: Any) -> str:
    """As a run file would have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
