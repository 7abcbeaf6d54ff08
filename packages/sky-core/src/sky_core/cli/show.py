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
from sky_core.cli.sizes import facts, measure, value_text
from sky_core.component import Component, Schema
from sky_core.config import Preset, Run, read_run_or_preset, run_json_schema

if TYPE_CHECKING:
    from rich.text import Text

PIPED_WIDTH = 100
"""Columns of the text where there is no terminal to ask."""


@click.command()
@click.argument("run_file", type=click.Path())
@click.argument("overrides", nargs=-1)
def check(run_file: str, overrides: tuple[str, ...]) -> None:
    """Check RUN_FILE, a run file or a model preset: keys, types, ranges, plugins.

    Every problem is reported at once; exit code 2 if there is one.
    """
    run = read_run_or_preset(run_file, overrides)
    what = "a model preset, to be extended, " if isinstance(run, Preset) else ""
    click.echo(f"{run_file}: {what}fine ({sum(1 for _ in components(run))} components)")


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
    """Show RUN_FILE, a run file or a model preset, resolved.

    Every slot, the class that fills it, where its code is, its options and its paper; then what the model amounts to.
    """
    run = read_run_or_preset(run_file, overrides)
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
        what = "preset" if isinstance(run, Preset) else "run"
        click.echo(json.dumps({what: run.as_dict(), "components": rows, "model": sizes}, indent=1))
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
    """The options of a table that are no parts, nor slots that stay empty, nor tables of a run."""

    def option(value: Any) -> bool:
        items = value if isinstance(value, tuple | list) else [value]
        hidden = Component if isinstance(table, Component) else Schema
        return value != (None,) and not any(isinstance(item, hidden) for item in items)

    plain = {key: value for key, value in table if option(value)}
    return {key: value.model_dump() if isinstance(value, Schema) else value for key, value in plain.items()}


# -------------------------------------------------------------------------------------------------------------- text


def _print(run: Run | Preset, rows: list[dict[str, Any]], given: dict[str, set[str]], sizes: dict[str, Any]) -> None:
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
        words = [Text(f"{key}={value_text(value)}", "" if key in given else "dim") for key, value in table.items()]
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
        own = sizes.get("tokenizer")
        known = f": {own['kind']}, {sizes['vocabulary']:,} ids, fingerprint {own['fingerprint']}" if own else ""
        put("tokenizer", Text(f"of {run.vocab_size:,} ids" if isinstance(run, Preset) else f"the data's own{known}"))
    what = "preset" if isinstance(run, Preset) else "run"
    tables = {what: run, **{name: value for name, value in run if type(value).__base__ is Schema}}
    for name, table in tables.items():
        found = {key: value for key, value in _options(table).items() if value not in (None, [])}
        if found:
            put(name, options(found, table.model_fields_set))
    if sizes:
        console.print()
        for label, line in facts(sizes):
            put(label, Text(line))
