"""Seconds from starting `sky train` to the end of the first training step of a small run.

What is timed is a process as a person starts it: importing, reading the run file, tokenizing (on the first start; later
ones find it prepared), building the model, the trial step of `dry_run`, the first step. Its end is the time that the
run's own metrics give for step 1. With `compile` the same run is started twice more with its layers compiled, with an
empty cache of compiled code and with the one that this left: what they take beyond the others is the compile time.
Beside it stands `python -c "import torch"`, in turn, which none of this can go below.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from sky_core.bench.ceilings import default_device
from sky_core.bench.defaults import record_name
from sky_core.bench.record import Record, spread
from sky_core.bench.report import Settings, bars, finish
from sky_core.errors import SkyError
from sky_core.run_directory import RunDirectory, list_runs
from sky_core.yaml_file import dump_yaml

TARGET_SECONDS = 4.0
"""Of the issue on speed, without compiling."""

BARE = 'python -c "import torch"'

SENTENCE = "the cat sat on the mat and the dog sat on the log; a cat and a dog, a mat and a log.\n"


def run(settings: Settings, *, starts: int, compile: bool) -> None:
    """Measure and record. Raises `SkyError` when a run fails."""
    if settings.smoke:
        starts = 1
    record = Record(
        settings.options(record_name("start", device=default_device())),
        what="from process start to the end of the first training step",
    )
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus.txt").write_text(SENTENCE * 2000, encoding="utf-8")
        (folder / "run.yaml").write_text(dump_yaml(run_file(settings.smoke)), encoding="utf-8")
        found["first, text not tokenized yet"] = [seconds_to_first_step(folder, "first")]
        found["later"], found[BARE] = [], []
        for i in range(starts):
            found["later"].append(seconds_to_first_step(folder, f"later-{i}"))
            found[BARE].append(seconds_to_import_torch())
        if compile:
            for kind in ("cold", "warm"):
                found[f"compiled, {kind} cache"] = [seconds_to_first_step(folder, kind, "train.compile=true")]
    record.measure(
        "seconds to the end of step 1", found["later"], "s", at_most=None if settings.smoke else TARGET_SECONDS
    )
    record.measure("the same when the text is yet to be tokenized", found["first, text not tokenized yet"], "s")
    record.measure(BARE, found[BARE], "s")
    pairs = zip(found["later"], found[BARE], strict=True)
    record.measure("to the end of step 1", [ours / bare for ours, bare in pairs], f"times {BARE}", better="lower")
    later = statistics.median(found["later"])
    if compile:
        for kind in ("cold", "warm"):
            (seconds,) = found[f"compiled, {kind} cache"]
            record.measure(f"compile time, {kind} cache", seconds - later, "s")
    plot = bars("from process start to the end of step 1", "s", {kind: spread(v) for kind, v in found.items()})
    finish(record, settings, plot, sizes={"run": run_file(settings.smoke)}, runs=found)


def run_file(smoke: bool) -> dict[str, Any]:
    """A small run: two steps of a character-level model of 0.8M parameters (nanoGPT's size for a CPU)."""
    model = {"n_layer": 1, "n_head": 2, "d_model": 16} if smoke else {"n_layer": 4, "n_head": 4, "d_model": 128}
    return {
        "name": "start",
        "plugins": [],
        "model": {**model, "max_length": 64},
        "tokenizer": "char",
        "data": {"kind": "text", "path": "corpus.txt", "sequence_length": 64, "split": "position", "cache": "cache"},
        "train": {"steps": 2, "batch_tokens": 768},
        "log": {"every": 1},
    }


def seconds_to_first_step(folder: Path, out: str, *overrides: str) -> float:
    """Start one run in `folder` and wait for its end. Raises `SkyError` with its last line when it fails."""
    click.echo(f"starting: {out}", err=True)
    # The second is where native operators are kept, and inductor's code where the first is not set.
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "XDG_CACHE_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "sky_core", "train", "run.yaml", f"out={out}", *overrides]
    began = time.time()
    done = subprocess.run(command, cwd=folder, env=os.environ | caches, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkyError(f"the run to be timed failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    (directory,) = list_runs(folder / out)
    return first_step(directory) - began


def seconds_to_import_torch() -> float:
    began = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, capture_output=True)
    return time.time() - began


def first_step(directory: RunDirectory) -> float:
    """When step 1 of a run was over, in seconds since 1970."""
    return next(float(line["time"]) for line in directory.metrics() if line["step"] == 1)
