"""Components and slots: a component is the schema *and* the factory of one part of a run.

Its fields are the keys of the run file (typed, with ranges and a description), its docstring is the help, and
`build(...)` imports torch and returns the part. A slot is an open choice between components: a field typed
`Slot[Attention]` looks its `kind` key up among what the loaded plugins offer.

    attention: sliding                        # short for {kind: sliding}
    attention: {kind: sliding, window: 256}
    attention: [sliding, full]                # Tiled[Attention]: repeated over the depth of the model

Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Never, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, field_validator
from pydantic_core import PydanticCustomError, core_schema

if TYPE_CHECKING:
    from typing_extensions import TypeAliasType, TypeVar

Catalog = Mapping[str, Mapping[str, "type[Component]"]]
"""What is on offer: slot -> kind -> component class."""

_active: Catalog | None = None


def set_active_catalog(catalog: Catalog) -> None:
    """Make `catalog` the one against which slots resolve their `kind`."""
    global _active
    _active = catalog


def active_catalog() -> Catalog:
    """The catalogue in use; loads core and every installed plugin when none was chosen yet."""
    if _active is None:
        from sky_core.plugins import load_plugins

        load_plugins()
    assert _active is not None
    return _active


def closest(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the candidate nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _accepts(annotation: Any, wanted: type) -> bool:
    return annotation is wanted or any(_accepts(arg, wanted) for arg in get_args(annotation))


class Schema(BaseModel):
    """A table of a run file: unknown keys are errors, values are immutable, nothing is silently converted.

    Two conversions are meant: `1e6` is an integer where an integer is wanted, and an integer is a float where a
    float is wanted. A boolean or a quoted number never passes as a number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: Any) -> Any:
        field = cls.model_fields[info.field_name]
        if isinstance(value, float) and value.is_integer():
            if _accepts(field.annotation, int) and not _accepts(field.annotation, float):
                return int(value)
        elif isinstance(value, Mapping) and "kind" not in value and isinstance(field.default, str):
            return {"kind": field.default, **value}  # options of the part that stands there by default
        return value


class Component(Schema):
    """Base of everything that fills a slot. Subclasses set `kind`; each slot's base class sets `slot`.

    `paper` names the source of the technique (arXiv identifier, DOI or title) and is shown by `sky show`, which also
    says where the code is: what `build` imports last, or what `implementation` names ("module:name").
    """

    slot: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str] = ""
    implementation: ClassVar[str] = ""

    @classmethod
    def summary(cls) -> str:
        """First sentence of the docstring."""
        return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").strip()

    def as_dict(self) -> dict[str, Any]:
        """What a run file would hold: `kind` first, then every option."""
        return {"kind": self.kind, **self.model_dump()}


def _resolve(base: type[Component], default_kind: str | None, value: Any) -> Component:
    if isinstance(value, base):
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        raise PydanticCustomError("slot", "a name or a mapping with 'kind' is needed, got {got}", {"got": repr(value)})
    options = dict(value)
    kind = options.pop("kind", default_kind)
    offered = active_catalog().get(base.slot, {})
    if kind is None:
        raise PydanticCustomError(
            "no_kind",
            "which {slot}? give 'kind' (have: {have})",
            {"slot": base.slot, "have": ", ".join(sorted(offered))},
        )
    if kind not in offered:
        from sky_core.plugins import where_to_find

        raise PydanticCustomError(
            "unknown_kind",
            "no {slot} called {kind} (have: {have}){near}{where}",
            {
                "slot": base.slot,
                "kind": repr(kind),
                "have": ", ".join(sorted(offered)),
                "near": closest(str(kind), offered),
                "where": where_to_find(base.slot, str(kind)),
            },
        )
    return offered[kind].model_validate(options)


_SLOT_MARK = "sky-slot"
"""Stands in a JSON Schema where a slot's kinds go until `json_schema` has put them there."""


class _Slot:
    """The pydantic half of `Slot[...]`: resolves `kind` when a value arrives."""

    def __init__(self, base: type[Component], default_kind: str | None = None) -> None:
        self.base = base
        self.default_kind = default_kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda value: _resolve(self.base, self.default_kind, value),
            serialization=core_schema.plain_serializer_function_ser_schema(Component.as_dict),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {_SLOT_MARK: (self.base.slot, self.default_kind)}


def _as_list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return [value]
    if not value:
        raise PydanticCustomError("slot", "the list is empty; give at least one")
    return value


class _Tiled(_Slot):
    """One component or a list of them; always a tuple once read."""

    def __init__(self, base: type[Component], *, optional: bool = False) -> None:
        super().__init__(base)
        self.optional = optional

    def _one(self, value: Any) -> Component | None:
        return None if value is None and self.optional else _resolve(self.base, None, value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        one = core_schema.no_info_plain_validator_function(self._one)
        many = core_schema.tuple_variable_schema(one, strict=False)

        def dump(components: tuple[Component | None, ...]) -> Any:
            dumped = [component and component.as_dict() for component in components]
            return dumped[0] if len(dumped) == 1 else dumped

        return core_schema.chain_schema(
            [core_schema.no_info_plain_validator_function(_as_list), many],
            serialization=core_schema.plain_serializer_function_ser_schema(dump),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        one = super().__get_pydantic_json_schema__(schema, handler)
        if self.optional:
            one = {"anyOf": [{"type": "null"}, one]}
        return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


if TYPE_CHECKING:
    # What type checkers read: a slot holds a part of its base class, a tiled one a tuple of them.
    Part = TypeVar("Part")
    Kind = TypeVar("Kind", default=None)
    Empty = TypeVar("Empty", default=Never)
    Slot = TypeAliasType("Slot", Part, type_params=(Part, Kind))
    Tiled = TypeAliasType("Tiled", tuple[Part | Empty, ...], type_params=(Part, Empty))
else:

    class Slot:
        """`Slot[Base]`: one component of that slot. `Slot[Base, Literal["kind"]]`: that kind when none is given."""

        def __class_getitem__(cls, item: Any) -> Any:
            base, default_kind = (item[0], get_args(item[1])[0]) if isinstance(item, tuple) else (item, None)
            return Annotated[base, _Slot(base, default_kind)]

    class Tiled:
        """`Tiled[Base]`: one component, or a list tiled over the layers. `Tiled[Base, None]`: entries may be null."""

        def __class_getitem__(cls, item: Any) -> Any:
            base, optional = (item[0], True) if isinstance(item, tuple) else (item, False)
            return Annotated[tuple[base, ...], _Tiled(base, optional=optional)]


def json_schema(table: type[Schema]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of `table`, with every kind that the active catalogue offers for each of its slots.

    Each slot is one definition that the others refer to, so parts may contain parts of their own slot.
    """
    definitions: dict[str, Any] = {}

    def define(slot: str, default_kind: str | None) -> str:
        name = f"slot_{slot}" + (f"_{default_kind}" if default_kind else "")
        if name not in definitions:
            definitions[name] = None  # known from here on, so that a part may refer to its own slot
            offered = active_catalog().get(slot, {})
            kinds = [option(offered[kind], default_kind) for kind in sorted(offered)]
            definitions[name] = {"anyOf": [{"enum": sorted(offered)}, *kinds]}
        return f"#/$defs/{name}"

    def option(component: type[Component], default_kind: str | None) -> dict[str, Any]:
        schema = expand(component.model_json_schema())
        required = [*schema.get("required", []), *([] if component.kind == default_kind else ["kind"])]
        return {
            "type": "object",
            "title": component.kind,
            "description": component.summary(),
            "properties": {"kind": {"const": component.kind}, **schema.get("properties", {})},
            "additionalProperties": False,
            "required": required,
        }

    def expand(node: Any) -> Any:
        if isinstance(node, dict):
            if _SLOT_MARK in node:
                slot, default_kind = node[_SLOT_MARK]
                default = node.get("default")
                rest = {key: value for key, value in node.items() if key != _SLOT_MARK}
                return rest | {"$ref": define(slot, default if isinstance(default, str) else default_kind)}
            definitions.update({name: expand(schema) for name, schema in node.get("$defs", {}).items()})
            return {key: expand(value) for key, value in node.items() if key != "$defs"}
        return [expand(item) for item in node] if isinstance(node, list) else node

    schema: dict[str, Any] = expand(table.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": definitions}
