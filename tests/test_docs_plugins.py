"""docs/plugins.md says what is: every hook with its signature, every slot with its build and its contract."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sky_core.testing as kit
from sky_core.component import Component
from sky_core.hookspecs import SPECS
from sky_core.slots import HOOKS, NO_SCALE
from workspace import ROOT

PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^#### `(sky_\w+)\([^\n]*\n(.*?)(?=^#)", PAGE, re.MULTILINE | re.DOTALL))
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CONTRACTS = [getattr(kit, name) for name in kit.__all__ if name != "ComponentContract"]


def signature(function: Callable[..., Any]) -> str:
    """`name(a: T, b: U) -> R` without self, with annotations and names of constants as they stand in the source."""
    given = inspect.signature(function)
    written = [str(p).replace("'", "") for p in given.parameters.values() if p.name not in ("self", "cls")]
    parameters = [text.replace(repr(NO_SCALE), "NO_SCALE") for text in written]
    return f"{function.__name__}({', '.join(parameters)}) -> {given.return_annotation}"


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_every_hook_is_documented_with_its_signature_and_no_other() -> None:
    specified = {signature(hook) for spec in SPECS for name, hook in vars(spec).items() if name.startswith("sky_")}
    assert set(re.findall(r"^#### `(sky_.*)`$", PAGE, re.MULTILINE)) == specified


def test_every_hook_has_an_example() -> None:
    missing = [name for name, text in SECTIONS.items() if f"@hookimpl\ndef {name}(" not in text]
    assert not missing


@pytest.mark.parametrize("hook", HOOKS)
def test_every_slot_is_documented_with_its_build_and_its_contract(hook: str) -> None:
    base, text = HOOKS[hook], flat(SECTIONS[hook])
    (contract,) = [contract for contract in CONTRACTS if contract.base is base]
    assert f"`{contract.__name__}`" in text
    for name in ("build", "train", "load"):
        if name in vars(base):
            function = inspect.unwrap(getattr(base, name))
            assert f"`{signature(getattr(function, '__func__', function))}`" in text


def test_every_contract_is_in_the_table_with_its_class_attributes() -> None:
    rows = {row[0]: row[2] for row in re.findall(r"^\| `(\w+)` \| (.*?) \| ?(.*?) ?\|$", PAGE, re.MULTILINE)}
    assert set(rows) == {contract.__name__ for contract in CONTRACTS}
    for contract in CONTRACTS:
        own = set(vars(contract).get("__annotations__", {})) - {"component", "base"}
        own |= {name for name, item in vars(contract).items() if isinstance(item, staticmethod)}
        assert set(re.findall(r"`(\w+)`", rows[contract.__name__])) == own, contract.__name__


def test_the_examples_are_python() -> None:
    assert len(BLOCKS) > len(HOOKS)
    for block in BLOCKS:
        ast.parse(block)


def test_the_loose_file_works_as_written(sky_sandbox: Path) -> None:
    from sky_core.plugins import load_plugins

    (sky_sandbox / "my_attention.py").write_text(BLOCKS[0], encoding="utf-8")
    (sky_sandbox / "test_mine.py").write_text(BLOCKS[1], encoding="utf-8")
    offered = load_plugins(["./my_attention.py"]).catalog["attention"]["my_sliding"]
    assert issubclass(offered, Component)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
