"""What every component owes its reader: a docstring, described options, valid defaults, a torch-free module.

`ComponentContract` is the base of all contracts. It also guards them: a subclass that overrides or removes a standard
test without a marked reason fails when it is defined.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from sky_core.component import Component, json_schema
from sky_core.config import Run
from sky_core.slots import Section
from sky_core.yaml_file import dump_yaml, parse_value

_EXCUSES = ("xfail", "skip", "skipif")


def _excused(test: Any) -> bool:
    """Whether `test` carries a mark that says why it deviates."""
    for mark in getattr(test, "pytestmark", []):
        reason = mark.kwargs.get("reason") or (mark.args[0] if mark.name == "skip" and mark.args else "")
        if mark.name in _EXCUSES and reason:
            return True
    return False


def _standard_tests(cls: type) -> dict[str, Any]:
    """The tests that the contracts of this package define for `cls`, most specific contract first."""
    tests: dict[str, Any] = {}
    for ancestor in cls.__mro__:
        if ancestor.__module__.startswith("sky_core.testing."):
            for name, test in vars(ancestor).items():
                if name.startswith("test_"):
                    tests.setdefault(name, test)
    return tests


class ComponentContract:
    """What holds for a component of any slot. Subclasses of the slots' contracts set `component`."""

    component: ClassVar[Any]
    """The part under test, with the options to test it with; a field of a run file, so nothing is built yet."""
    base: ClassVar[type[Component]] = Component
    """The slot's base class (set by each contract)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, standard in _standard_tests(cls).items():
            chosen = getattr(cls, name)
            if chosen is not standard and not _excused(chosen):
                raise TypeError(
                    f"{cls.__qualname__}.{name} replaces a standard test; mark the replacement with"
                    f" @pytest.mark.xfail(reason=...) or @pytest.mark.skip(reason=...), or give it another name"
                )

    def test_the_component_fills_its_slot(self) -> None:
        assert isinstance(self.component, self.base)

    def test_the_kind_is_a_name_and_no_option(self) -> None:
        assert re.fullmatch(r"[a-z0-9]+([_-][a-z0-9]+)*", self.component.kind)
        assert "kind" not in type(self.component).model_fields, "write `kind: ClassVar = ...`"

    def test_the_docstring_is_the_help(self) -> None:
        assert vars(type(self.component)).get("__doc__"), "the class needs a docstring of its own"
        assert len(self.component.summary()) <= 200, "the first paragraph is what listings show: keep it short"

    def test_every_option_has_a_description(self) -> None:
        bare = [name for name, option in type(self.component).model_fields.items() if not option.description]
        assert not bare, f"options without Field(description=...): {bare}"

    def test_the_defaults_are_valid(self) -> None:
        cls = type(self.component)
        needed = {name for name, option in cls.model_fields.items() if option.is_required()}
        barest = cls.model_validate(self.component.model_dump(include=needed))
        assert cls.model_validate(barest.model_dump()) == barest

    def test_a_run_file_gives_the_component_back(self) -> None:
        written = parse_value(dump_yaml(self.component.as_dict()))
        assert written.pop("kind") == self.component.kind
        assert type(self.component).model_validate(written) == self.component

    def test_an_unknown_option_is_an_error(self) -> None:
        with pytest.raises(ValidationError, match="no_such_option"):
            type(self.component).model_validate({**self.component.model_dump(), "no_such_option": 1})

    def test_the_json_schema_builds(self) -> None:
        schema = json_schema(type(self.component))
        assert set(schema.get("properties", {})) == set(type(self.component).model_fields)
        json.dumps(schema, allow_nan=False)

    def test_the_module_imports_no_torch(self) -> None:
        assert _imports_torch(type(self.component).__module__, inspect.getfile(type(self.component))) == ""


@cache
def _imports_torch(module: str, file: str) -> str:
    """What goes wrong when the module is imported in a fresh interpreter: an error, "torch", or nothing."""
    by_name = f"import importlib.util, runpy, sys; sys.path[:0] = {sys.path!r}\n"
    load = (
        "try: found = importlib.util.find_spec(sys.argv[1])\n"
        "except (ImportError, ValueError): found = None\n"
        "__import__(sys.argv[1]) if found else runpy.run_path(sys.argv[2])\n"
        "print('torch' if 'torch' in sys.modules else '', end='')"
    )
    command = [sys.executable, "-c", by_name + load, module, str(Path(file).resolve())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


class SectionContract(ComponentContract):
    """A plugin's own table in the run file."""

    base = Section

    def test_the_key_is_free(self) -> None:
        assert self.component.kind not in {*Run.model_fields, "extends"}, "core has a key of this name"

    def test_the_key_can_be_an_attribute(self) -> None:
        assert self.component.kind.isidentifier(), "run.section(kind) and overrides need a name without dashes"
