"""Run files: the schema of a run, and how a file is read (extends, overrides, plugins).

A file that says a model and nothing of a run is a model preset: it can be shown, and run files extend it.

All problems of a file are reported at once (`sky_core.problems`). Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sky_core import slots
from sky_core.component import Schema, Slot, json_schema
from sky_core.errors import ConfigError
from sky_core.origin import with_model, with_tokenizer
from sky_core.plugins import load_plugins, loaded_plugins
from sky_core.problems import dotted, problems
from sky_core.yaml_file import Lines, parse_value, read_yaml

Table = TypeVar("Table", bound=Schema)


class EvalSection(Schema):
    """When the model is measured, and how."""

    every: Annotated[int | None, Field(ge=1, description="steps between evaluations; null: only at the end")] = None
    tasks: Annotated[list[Slot[slots.Eval]], Field(description="what is measured")] = Field(
        default=["loss"], validate_default=True
    )

    @field_validator("tasks")
    @classmethod
    def _distinct(cls, tasks: list[slots.Eval]) -> list[slots.Eval]:
        names = [str(getattr(task, "name", task.kind)) for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise PydanticCustomError(
                    "twice", "two evaluations are called {name}; give one another `name`", {"name": repr(name)}
                )
        return tasks


class CheckpointSection(Schema):
    """When the run is saved, and which checkpoints stay."""

    every: Annotated[int | None, Field(ge=1, description="steps between checkpoints; null: only at the end")] = None
    keep_last: Annotated[int, Field(ge=1, description="newest checkpoints that stay")] = 2
    keep_best: Annotated[bool, Field(description="also keep the one with the lowest validation loss")] = True


class LogSection(Schema):
    """What is written while training."""

    every: Annotated[int, Field(ge=1, description="steps between metric lines")] = 10
    tensorboard: Annotated[bool, Field(description="also write TensorBoard files (extra: tensorboard)")] = False


class SampleSection(Schema):
    """Text sampled while training, to see the model learn."""

    every: Annotated[int | None, Field(ge=1, description="steps between samples; null: none")] = None
    prompts: Annotated[list[str], Field(min_length=1, description="one sample for each")] = ["\n"]
    max_new_tokens: Annotated[int, Field(ge=1, description="tokens sampled for each prompt")] = 100
    sampler: Annotated[Slot[slots.Sampler, Literal["sample"]], Field(description="how the next token is chosen")] = (
        Field(default={}, validate_default=True)
    )


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="part of the run directory's name")]


class Run(Schema):
    """A run file. Plugins may add top-level tables of their own (sections)."""

    name: Name = "run"
    seed: Annotated[int, Field(ge=0, description="the run's only source of randomness")] = 1337
    out: Annotated[str, Field(description="folder that run directories are made in")] = "runs"
    tags: Annotated[list[str], Field(description="words to find the run by")] = []
    plugins: Annotated[
        list[str] | None, Field(description="plugins to load (names, `name>=1.0`, ./file.py); null: all installed")
    ] = None
    model: Annotated[
        Slot[slots.Model, Literal["decoder"]], Field(description="the architecture; left out: that of `init`, if any")
    ] = Field(default={}, validate_default=True)
    init: Annotated[str | None, Field(description="start from the weights of this run, checkpoint or hf:DIR")] = None
    adapters: Annotated[list[Slot[slots.Adapter]], Field(description="changes attached to the model")] = []
    tokenizer: Annotated[
        Slot[slots.Tokenizer] | None, Field(description="null: the one that the data was made with")
    ] = None
    data: Annotated[Slot[slots.Dataset], Field(description="where sequences come from")]
    objective: Annotated[Slot[slots.Objective, Literal["next_token"]], Field(description="the loss")] = Field(
        default={}, validate_default=True
    )
    optimizer: Annotated[Slot[slots.Optimizer, Literal["adamw"]], Field(description="how parameters move")] = Field(
        default={}, validate_default=True
    )
    schedule: Annotated[
        Slot[slots.Schedule, Literal["cosine"]], Field(description="the learning rate over the steps")
    ] = Field(default={}, validate_default=True)
    train: Annotated[Slot[slots.Trainer, Literal["fit"]], Field(description="the training loop")]
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    sample: SampleSection = Field(default={}, validate_default=True)
    callbacks: Annotated[list[Slot[slots.Callback]], Field(description="further observers of the run")] = []

    def section(self, kind: str) -> Any:
        """A plugin's own table, None when the run file has none."""
        return getattr(self, kind, None)

    def as_dict(self) -> dict[str, Any]:
        """The resolved run: reading it again gives the same run."""
        return self.model_dump()


class Preset(Schema):
    """A model and what belongs to it: the run file of a model alone, for others to extend."""

    name: Name = "preset"
    plugins: Annotated[list[str] | None, Field(description="as in a run file")] = None
    model: Annotated[Slot[slots.Model, Literal["decoder"]], Field(description="the architecture")]
    tokenizer: Annotated[Slot[slots.Tokenizer] | None, Field(description="null: only its size is known")] = None
    optimizer: Annotated[
        Slot[slots.Optimizer, Literal["adamw"]], Field(description="whose state `sky show` counts")
    ] = Field(default={}, validate_default=True)

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, else rows of the model's embedding."""
        sizes = (getattr(part, "vocab_size", None) for part in (self.tokenizer, self.model))
        return next((size for size in sizes if size is not None), 0)

    @model_validator(mode="after")
    def _vocabulary_fits(self) -> Preset:
        rows = getattr(self.model, "vocab_size", None)
        if not self.vocab_size:
            raise ValueError("a preset has no data to learn its vocabulary from: set model.vocab_size")
        if rows is not None and rows < self.vocab_size:
            raise ValueError(f"model.vocab_size: {rows} rows cannot hold the tokenizer's {self.vocab_size} ids")
        return self

    def as_dict(self) -> dict[str, Any]:
        """The resolved preset: reading it again gives the same preset."""
        return self.model_dump()


def run_schema() -> type[Run]:
    """`Run` with the sections of the loaded plugins."""
    sections = loaded_plugins().catalog["section"]
    fields: dict[str, Any] = {kind: (section | None, None) for kind, section in sections.items()}
    return create_model("Run", __base__=Run, __doc__=Run.__doc__, **fields) if fields else Run


def run_json_schema() -> dict[str, Any]:
    """The JSON Schema of run files with everything the loaded plugins offer, for editors."""
    schema = json_schema(run_schema())
    schema["properties"]["extends"] = {"type": "string", "description": "a run file that this one changes"}
    return schema


def read_run(path: str | Path, overrides: Iterable[str] = ()) -> Run:
    """Read, merge, override and validate a run file; loads the plugins it asks for.

    `overrides` are `dotted.path=value` strings. Raises `ConfigError` with every problem, or `PluginError`.
    """
    return parse_run(*_read(path, overrides), base=Path(path).parent)


def read_run_or_preset(path: str | Path, overrides: Iterable[str] = ()) -> Run | Preset:
    """As `read_run`; a file with a model, but nothing that only a run has, is a preset."""
    data, lines = _read(path, overrides)
    if "model" in data and not data.keys() & (Run.model_fields.keys() - Preset.model_fields.keys()):
        return parse_preset(data, lines, base=Path(path).parent)
    return parse_run(data, lines, base=Path(path).parent)


def _read(path: str | Path, overrides: Iterable[str]) -> tuple[dict[str, Any], Lines]:
    """What a file and those it extends say, with overrides applied, and where each key stands."""
    data, lines = _read_extended(Path(path), ())
    lines.setdefault((), str(path))
    for override in overrides:
        _apply(data, override, lines)
    return data, lines


def parse_run(data: Mapping[str, Any], lines: Lines | None = None, base: Path | None = None) -> Run:
    """Validate a run given as a mapping; `lines` places the errors, `base` is where loose plugin files are sought."""
    data = with_model(_with_plugins(data, base))
    run = with_tokenizer(_validate(run_schema(), data, lines))
    _check_together(run)
    loaded_plugins().hook.sky_configured(run=run)
    return run


def parse_preset(data: Mapping[str, Any], lines: Lines | None = None, base: Path | None = None) -> Preset:
    """Validate a preset given as a mapping; as `parse_run`."""
    return _validate(Preset, _with_plugins(data, base), lines)


def _with_plugins(data: Mapping[str, Any], base: Path | None) -> Mapping[str, Any]:
    """Load the plugins that `data` asks for; `data` with the places of loose files resolved."""
    plugins = data.get("plugins")
    if plugins is not None and not (isinstance(plugins, list) and all(isinstance(name, str) for name in plugins)):
        raise ConfigError(f"plugins: a list of names is needed, got {plugins!r}")
    if plugins is not None and base is not None:
        files = {name: str((base / name).resolve()) for name in plugins if name.endswith(".py")}
        data = {**data, "plugins": [files.get(name, name) for name in plugins]}
    load_plugins(data.get("plugins"))
    return data


def _validate(schema: type[Table], data: Mapping[str, Any], lines: Lines | None) -> Table:
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(problems(error, schema, data, lines or {})) from None


def _check_together(run: Run) -> None:
    """A sequence must fit the model and the objective find what it trains, where that is known before all is built."""
    if run.objective.kind == "multi_token" and getattr(run.model, "n_mtp", None) == 0:
        raise ConfigError(
            "objective: multi_token trains modules that predict further tokens: set model.n_mtp to 1 or more"
        )
    sequence, context = getattr(run.data, "sequence_length", None), getattr(run.model, "max_length", None)
    if sequence is not None and context is not None and sequence > context:
        raise ConfigError(
            f"data.sequence_length: {sequence} tokens do not fit model.max_length={context};"
            " lower one or raise the other"
        )


def _read_extended(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], Lines]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(map(str, seen))}")
    data, lines = read_yaml(path)
    base = data.pop("extends", None)
    if base is None:
        return data, lines
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: a path is needed, got {base!r}")
    below, below_lines = _read_extended(path.parent / base, (*seen, path.resolve()))
    return merge(below, data), below_lines | lines


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`: mappings merge key by key, but one of another `kind` replaces the whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        old = {"kind": old} if isinstance(old, str) and isinstance(value, Mapping) and "kind" not in value else old
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        ):
            value = merge(old, value)
        merged[key] = value
    return merged


def _apply(data: dict[str, Any], override: str, lines: Lines) -> None:
    """Set `dotted.path=value` in place."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r}: an override is written key=value, as in model.n_layer=6")
    keys: list[str | int] = [int(part) if part.isdigit() else part for part in path.split(".")]
    try:
        value = parse_value(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is no YAML ({getattr(error, 'problem', None) or error})") from error
    node: Any = data
    for depth, key in enumerate(keys[:-1]):
        child = node.get(key) if isinstance(node, dict) else node[key] if _has(node, key) else None
        if child is None and isinstance(keys[depth + 1], int):
            raise ConfigError(f"{override!r}: the file has no list {dotted(keys[: depth + 1])}; write the whole list")
        if child is None or isinstance(child, str):
            child = {} if child is None else {"kind": child}
            _set(node, key, child, override)
        if not isinstance(child, dict | list):
            raise ConfigError(f"{override!r}: {dotted(keys[: depth + 1])} is {child!r}, it has no keys")
        node = child
    _set(node, keys[-1], value, override)
    lines[tuple(keys)] = "command line"


def _has(node: Any, key: str | int) -> bool:
    return isinstance(node, list) and isinstance(key, int) and key < len(node)


def _set(node: Any, key: str | int, value: Any, override: str) -> None:
    if isinstance(node, list) and not _has(node, key):
        raise ConfigError(f"{override!r}: the list has {len(node)} entries, there is no {key!r} (they count from 0)")
    if isinstance(node, dict):
        node.update(merge(node, {str(key): value}))
    else:
        node[key] = value
