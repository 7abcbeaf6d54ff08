"""How the errors of a run file are told: all at once, each with its place, its path, the value and the nearest right
word. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sky_core.component import Component, Schema, _Slot, closest
from sky_core.plugins import loaded_plugins
from sky_core.yaml_file import Lines


def dotted(keys: Iterable[str | int]) -> str:
    """A path as overrides have it: `model.attention.0.window`."""
    return ".".join(map(str, keys))


def problems(error: ValidationError, schema: type[Schema], data: Any, lines: Lines) -> list[str]:
    """What is wrong with a table, in lines: path, place, value, what would be right."""
    found = []
    for detail in error.errors():
        place = next(
            (lines[detail["loc"][:n]] for n in range(len(detail["loc"]), -1, -1) if detail["loc"][:n] in lines), ""
        )
        path = dotted(_written(detail["loc"], data))
        line = f"{path}: {_explain(detail, schema, data)}" if path else _explain(detail, schema, data)
        found.append((list(lines).index(detail["loc"]) if detail["loc"] in lines else len(lines), place, line))
    return [f"{place}: {line}" if place else line for _, place, line in sorted(found, key=lambda item: item[0])]


def _written(location: Iterable[str | int], data: Any) -> Iterator[str | int]:
    """`location` as it stands in the file: a part given alone where a list may stand has no index."""
    for part in location:
        if not isinstance(part, int) or isinstance(data, list | tuple):
            yield part
        data = _child(data, part)


def _child(data: Any, part: str | int) -> Any:
    if isinstance(part, int):
        return data[part] if isinstance(data, list | tuple) and part < len(data) else data
    return data.get(part) if isinstance(data, Mapping) else data


def _explain(detail: ErrorDetails, schema: type[Schema], data: Any) -> str:
    if detail["type"] == "extra_forbidden":
        keys = _keys_at(detail["loc"][:-1], schema, data)
        near = closest(str(detail["loc"][-1]), keys)
        return f"unknown key{near or '; keys here: ' + (', '.join(keys) or 'none')}"
    if detail["type"] == "missing":
        return "this key is needed"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in ("value_error", "unknown_kind", "slot", "no_kind") or isinstance(detail["input"], Mapping):
        return message
    return f"{message[0].lower()}{message[1:]}, got {detail['input']!r}"


def _keys_at(location: tuple[str | int, ...], schema: type[Schema], data: Any) -> list[str]:
    """The keys allowed in the table at `location`, found by walking schema and data together."""
    current: type[Schema] | None = schema
    slot: _Slot | None = None
    default_kind: str | None = None
    for part in location:
        data = _child(data, part)
        if isinstance(part, str) and current is not None:
            field = current.model_fields.get(part)
            slot = _find(field.annotation, field.metadata) if field else None
            default_kind = slot.default_kind if slot else None
            if field is not None and isinstance(field.default, str):
                default_kind = field.default
            current = _table(field.annotation, data) if field else None
        if slot is not None:
            kind = data.get("kind", default_kind) if isinstance(data, Mapping) else data
            current = loaded_plugins().catalog[slot.base.slot].get(str(kind))
    if current is None:
        return []
    return [*(["kind"] if issubclass(current, Component) and slot else []), *current.model_fields]


def _table(annotation: Any, data: Any = None) -> type[Schema] | None:
    """The table that an annotation (`Table`, `Table | None`) means; of several, the one of the `kind` in `data`."""
    candidates = (annotation, *get_args(annotation))
    tables = [one for one in candidates if isinstance(one, type) and issubclass(one, Schema)]
    kind = data.get("kind") if isinstance(data, Mapping) else None
    named = [table for table in tables if "kind" in table.model_fields and table.model_fields["kind"].default == kind]
    return next(iter(named or tables), None)


def _find(annotation: Any, metadata: Iterable[Any] = ()) -> _Slot | None:
    """The slot in a field's annotation, however deep (`list[Slot[...]]`, `Slot[...] | None`)."""
    for item in metadata:
        if isinstance(item, _Slot):
            return item
    for argument in get_args(annotation):
        found = argument if isinstance(argument, _Slot) else _find(argument, getattr(argument, "__metadata__", ()))
        if found is not None:
            return found
    return None
