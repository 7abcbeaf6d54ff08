"""From a component to the code that does its work, without importing it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import textwrap
from pathlib import Path

from sky_core.component import Component
from sky_core.errors import PluginError


def implementation(component: type[Component]) -> tuple[str, Path, int]:
    """(dotted name, file, line) of what a component's `build` returns, or of the function that makes it.

    By convention `build` imports its implementation as the last thing it imports; where it cannot, the component says
    `implementation: ClassVar = "module:name"`. A component that imports nothing is its own implementation. Raises
    `PluginError` when what it names is not there.
    """
    if component.implementation:
        module, _, name = component.implementation.partition(":")
        found = _definition(module, name)
        if found is None:
            raise PluginError(
                f"{component.__module__}.{component.__qualname__}: no {component.implementation} is there"
            )
        return found
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
