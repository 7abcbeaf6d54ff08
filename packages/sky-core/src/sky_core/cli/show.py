"""`sky show`, `sky check` and `sky schema`: a run file resolved, checked, and described for editors.

Only `sky show` without `--no-build` imports torch.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from sky_core.component import Component, Schema
from sky_core.config import Run, read_run, run_json_schema


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
@click.option("--no-build", is_flag=True, help="Do not build the model: no parameter counts, and no torch.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(run_file: str, overrides: tuple[str, ...], no_build: bool, as_json: bool) -> None:
    """Show RUN_FILE resolved: every slot, the class that fills it, where its code is, its options and its paper."""
    run = read_run(run_file, overrides)
    rows = [_row(path, component) for path, component in components(run)]
    sizes = {} if no_build else model_sizes(run)
    if as_json:
        click.echo(json.dumps({"run": run.as_dict(), "components": rows, "model": sizes}, indent=1))
        return
    for row in rows:
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        click.echo(f"{row['path']:<28} {row['kind']} ({options})" if options else f"{row['path']:<28} {row['kind']}")
        click.echo(f"{'':<28} {row['class']}  {row['where']}")
        if row["paper"]:
            click.echo(f"{'':<28} {row['paper']}")
    for name, value in sizes.items():
        click.echo(f"{name:<28} {value:,}" if isinstance(value, int | float) else f"{name:<28} {value}")


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
    options = {
        key: value
        for key, value in component
        if not any(isinstance(item, Schema) for item in (value if isinstance(value, tuple | list) else [value]))
    }
    return {
        "path": path,
        "kind": component.kind,
        "class": name,
        "where": f"{file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}:{line}",
        "options": options,
        "summary": component.summary(),
        "paper": component.paper,
    }


def implementation(component: type[Component]) -> tuple[str, Path, int]:
    """(dotted name, file, line) of what a component's `build` returns, found without importing it.

    By convention `build` imports its implementation as the last thing it imports; a component that imports nothing is
    its own implementation.
    """
    build = next((getattr(component, name) for name in ("build", "train") if hasattr(component, name)), component)
    tree = ast.parse(textwrap.dedent(inspect.getsource(build)))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    for node in reversed(imports):
        assert node.module is not None
        name = node.names[-1].name
        found = _definition(node.module, name) or _definition(f"{node.module}.{name}", _used_of(tree, name))
        if found is not None:
            return found
    file, line = inspect.getsourcefile(component), inspect.getsourcelines(component)[1]
    return f"{component.__module__}.{component.__qualname__}", Path(file or "?"), line


def _used_of(tree: ast.AST, module: str) -> str:
    """The last name that the source takes from `module`: `cosine` where it says `schedule.cosine(...)`."""
    uses = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    ]
    return max(uses, key=lambda node: (node.lineno, node.col_offset)).attr if uses else ""


def _definition(module: str, name: str) -> tuple[str, Path, int] | None:
    """(dotted name, file, line) of a class or function that `module` defines; None when there is no such thing."""
    spec = importlib.util.find_spec(module) if importlib.util.find_spec(module.rpartition(".")[0]) else None
    if spec is None or spec.origin is None:
        return None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return f"{module}.{name}", Path(spec.origin), node.lineno
    return None


def model_sizes(run: Run) -> dict[str, Any]:
    """Parameters, FLOPs per token, cache and training bytes of the run's model."""
    import torch

    dataset = run.data.build(run.seed, run.tokenizer)
    with torch.device("meta"):
        model = run.model.build(dataset.tokenizer.vocab_size)
    count = model.n_parameters()
    return {
        **{f"parameters.{name}": number for name, number in count.items()},
        "vocabulary": dataset.tokenizer.vocab_size,
        "flops_per_token": model.flops_per_token(dataset.sequence_length),
        "bytes_to_train": count["total"] * BYTES_PER_PARAMETER,
        **{f"data.{name}": value for name, value in dataset.describe().items()},
    }


BYTES_PER_PARAMETER = 16
"""fp32 weight, gradient and two moments of AdamW; activations come on top."""
