"""The laboratory from Python: load a model, sample from it, train a run. This module imports torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sky_core.config import Run, parse_run, read_run
from sky_core.errors import SkyError, UserError
from sky_core.generation.text import generate
from sky_core.plugins import loaded_plugins
from sky_core.run_directory import RunDirectory, find_run
from sky_core.tokenizer.files import load_tokenizer
from sky_core.training import checkpoint
from sky_core.training.trainer import Result
from sky_core.yaml_file import dump_yaml, read_yaml

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer

__all__ = ["generate", "load", "open_run", "resume", "train"]


def load(source: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """The model (in evaluation mode, on the CPU) and tokenizer of a run or of anything a plugin can load.

    `source` is a run (directory, name, unique prefix, `@last`, `@best`, each with `@step` behind it), a checkpoint
    folder, or `scheme:rest` for plugins (`hf:DIR`). Raises `UserError` when there is no such thing and
    `CheckpointError` when it is damaged.
    """
    text = str(source)
    answer: tuple[LanguageModel, Tokenizer] | None = loaded_plugins().hook.sky_load_model(source=text)
    if answer is not None:
        return answer
    folder = Path(text)
    if not (folder / "MANIFEST.json").is_file():
        run, which = find_run(text.removeprefix("run:"))
        folder = run.checkpoint(which)
    return load_checkpoint(folder)


def load_checkpoint(folder: Path) -> tuple[LanguageModel, Tokenizer]:
    """Model and tokenizer of one checkpoint folder; the averaged weights when the run kept an average."""
    checkpoint.verify_checkpoint(folder)
    data, lines = read_yaml(folder / "run.yaml")
    run = parse_run(data, lines, base=folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    model: LanguageModel = run.model.build(tokenizer.vocab_size)
    for adapter in run.adapters:
        adapter.build(model)
    loaded_plugins().hook.sky_model_built(model=model, run=run)
    averages = checkpoint.load_tensors(folder, "training/ema")
    adapters = torch.nn.ModuleList(attached.module for attached in model.adapters)
    for part, module in (("model", model), ("adapters", adapters)):
        weights = checkpoint.load_tensors(folder, part)
        averaged = {name: averages.get(f"{part}.{name}", weight) for name, weight in weights.items()}
        checkpoint.load_weights(module, averaged, folder)
        module.eval()
    return model, tokenizer


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
