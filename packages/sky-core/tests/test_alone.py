"""Core by itself does the whole job: no plugin, no extra; the `alone` session runs this from the built wheel."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from sky_core.errors import UserError

RUN = """\
model: {n_layer: 1, n_head: 2, d_model: 16}
data: {kind: tokens, path: prepared, sequence_length: 16}
train: {steps: 3, batch_tokens: 32, precision: fp32}
log: {every: 1}
"""


def sky(*arguments: str, cwd: Path, expected: int = 0) -> str:
    """What the installed `sky` command prints, run as a process of its own and with no plugin."""
    command = [sys.executable, "-m", "sky_core", *arguments]
    environment = {**os.environ, "SKY_PLUGINS": ""}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stderr
    return done.stdout


NEEDS_AN_EXTRA = {"sky_core.eval.harness": "lm-eval"}
"""Modules whose classes derive from those of a library: without it they say which extra is missing."""


def test_every_module_imports_with_what_core_declares() -> None:
    import sky_core

    for module in pkgutil.walk_packages(sky_core.__path__, "sky_core."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except UserError as error:
            if f"pip install 'sky-core[{NEEDS_AN_EXTRA.get(module.name)}]'" not in str(error):
                raise


def test_the_command_is_installed_and_lists_its_parts(tmp_path: Path) -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="sky")
    assert callable(entry.load())
    assert "train" in sky("--help", cwd=tmp_path)
    listed = sky("plugins", cwd=tmp_path)
    assert "decoder" in listed
    assert "sky-core" in listed


@pytest.mark.skipif("SKY_ALONE" not in os.environ, reason="other plugins may be installed; the `alone` session asks")
def test_no_plugin_is_installed() -> None:
    assert [entry.value for entry in importlib.metadata.entry_points(group="sky")] == []


def test_text_becomes_a_trained_model_that_samples(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A small text, said again and again. " * 200)
    (tmp_path / "run.yaml").write_text(RUN)
    sky("data", "prepare", "text.txt", "--out", "prepared", "--tokenizer", "byte", "--split", "position", cwd=tmp_path)
    sky("train", "run.yaml", cwd=tmp_path)
    (directory,) = (tmp_path / "runs").iterdir()
    assert json.loads((directory / "run.json").read_text())["state"] == "done"
    losses = [json.loads(line).get("loss") for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if loss is not None]) == 3
    assert sky("sample", str(directory), "--prompt", "A small", "--max-new-tokens", "5", cwd=tmp_path)
