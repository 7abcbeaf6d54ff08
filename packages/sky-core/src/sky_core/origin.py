"""What a run starts from (`init:`): its model and tokenizer as a run file would have them. Torch-free.

A run file with `init:` and no `model:` has the model of what it starts from; `model: {kind: init, dropout: 0.1}`
changes single options of it. Text that is tokenized on the fly is so by the tokenizer of what it starts from, unless
the run file names one; data that was prepared before has its own, which must be the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sky_core import slots
from sky_core.component import Schema, active_catalog
from sky_core.errors import ConfigError
from sky_core.yaml_file import read_yaml

if TYPE_CHECKING:
    from sky_core.config import Run

Table = dict[str, Any]
SomeRun = TypeVar("SomeRun", bound="Run")

KIND = "init"
"""The `kind` by which a run file's `model:` names the model that the run starts from."""


def with_model(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run file's tables with `model:` filled in from `init:` where it is left to that.

    Raises `ConfigError` where it is, in words, and nothing says what that model is.
    """
    from sky_core.config import merge

    source, model = data.get("init"), data.get("model", {"kind": KIND})
    model = {"kind": model} if isinstance(model, str) else model
    if not isinstance(model, Mapping) or model.get("kind") != KIND or not (source or "model" in data):
        return data
    if not source:
        raise ConfigError(f"model: kind {KIND} is the model of what the run starts from; name that with init:")
    found = _tables(source) if isinstance(source, str) else None
    if found is None and "model" not in data:
        return data
    if found is None:
        raise ConfigError(f"model: kind {KIND}: what model {source} has is not known before it is read; write it out")
    return {**data, "model": merge(found[0], {key: value for key, value in model.items() if key != "kind"})}


def with_tokenizer(run: SomeRun) -> SomeRun:
    """`run` with `tokenizer:` filled in from `init:` where its data needs one and none is named."""
    if run.init is None or run.tokenizer is not None or not _tokenizes(run.data):
        return run
    found = _tables(run.init)
    if found is None:
        return run
    kind, path = found[1]
    component = cast("type[slots.Tokenizer]", active_catalog()["tokenizer"][kind])
    return run.model_copy(update={"tokenizer": component.model_validate({"path": str(path)})})


def _tables(source: str) -> tuple[Table, tuple[str, Path]] | None:
    """(`model:`, kind and path of the tokenizer) of a Hugging Face folder, a run or a checkpoint; None for what only a
    plugin can read."""
    from sky_core.hf.table import folder_of, model_table
    from sky_core.run_directory import find_run

    if (folder := folder_of(source)) is not None:
        return model_table(folder)[1], ("huggingface", folder.resolve())
    scheme, colon, _ = source.partition(":")
    if colon and scheme != "run" and not Path(source).exists():
        return None
    folder = Path(source)
    if not (folder / "MANIFEST.json").is_file():
        run, which = find_run(source.removeprefix("run:"))
        folder = run.checkpoint(which)
    return read_yaml(folder / "run.yaml")[0]["model"], ("saved", (folder / "tokenizer").resolve())


def _tokenizes(table: Schema) -> bool:
    """Whether a dataset, or one inside of it, makes ids of text itself."""
    if isinstance(table, slots.Dataset) and table.tokenizes:
        return True
    values = [item for _, value in table for item in (value if isinstance(value, list | tuple) else [value])]
    return any(_tokenizes(value) for value in values if isinstance(value, Schema))
