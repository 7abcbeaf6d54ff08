"""The laboratory from Python: load a model, sample from it, train a run. This module imports torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sky_core.config import Run, parse_run, read_run
from sky_core.errors import SkyError, UserError
from sky_core.generation.text import generate
from sky_core.run_directory import RunDirectory, find_run
from sky_core.training.load import load
from sky_core.training.trainer import Result
from sky_core.yaml_file import dump_yaml

__all__ = ["generate", "load", "open_run", "resume", "train"]


def open_run(source: str | Path) -> RunDirectory:
    """The run directory that `source` names (see `load`)."""
    return find_run(str(source))[0]


def train(run: str | Path | dict[str, Any] | Run, overrides: Iterable[str] = ()) -> Result:
    """Train a run file (or the same as a mapping) in a new run directory; returns how it ended.

    `overrides` are `dotted.path=value` strings and belong to a run file. Raises `ConfigError`, `DataError`,
    `Diverged`, ...
    """
    overrides = list(overrides)
    if overrides and not isinstance(run, str | Path):
        raise UserError(f"overrides ({', '.join(overrides)}) change a run file; change a mapping before it is given")
    if isinstance(run, str | Path):
        resolved, given = read_run(run, overrides), Path(run).read_text(encoding="utf-8")
    elif isinstance(run, Run):
        resolved, given = run, dump_yaml(run.as_dict())
    else:
        resolved, given = parse_run(run), dump_yaml(run)
    directory = RunDirectory.create(resolved, config_input=given)
    try:
        return _run(resolved, directory, None)
    except BaseException:
        if "started" not in directory.info:  # nothing was trained: there is nothing to resume, and nothing to keep
            shutil.rmtree(directory.path)
        raise


def resume(source: str | Path, overrides: Iterable[str] = ()) -> Result:
    """Continue a run from its last checkpoint (or `name@step`), in its own directory, exactly as if it had never ended.

    A run that died before its first checkpoint starts again. `overrides` change the resolved run file, as
    `train.steps=...` for a longer run. Raises `UserError` when the run is complete or in use.
    """
    directory, which = find_run(str(source))
    run = read_run(directory.path / "config.yaml", overrides)
    fresh = which == "last" and not directory.checkpoints
    return _run(run, directory, None if fresh else directory.checkpoint(which))


def _run(run: Run, directory: RunDirectory, folder: Path | None) -> Result:
    with directory.lock(), directory.log_file():
        trainer = run.train.build(run, directory)
        trainer.resume(folder)
        try:
            result: Result = trainer.train()
        except OSError as error:
            where = error.filename or directory.path
            raise SkyError(
                f"{where}: {error.strerror or error}; what was saved is untouched: `sky resume {directory.path}`"
            ) from error
    return result
