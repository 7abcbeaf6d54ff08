"""Components, slots and tiling: what a run file's values become, and what is refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError

from sky_core import component as components
from sky_core.component import Component, Schema, Slot, Tiled, json_schema


class Part(Component):
    slot: ClassVar = "part"


class Plain(Part):
    """Nothing to set.

    More text.
    """

    kind: ClassVar = "plain"


class Wide(Part):
    kind: ClassVar = "wide"
    window: Annotated[int, Field(ge=1, description="tokens")] = 4
    inner: Annotated[Slot[Part], Field(description="another part")] = Field(default="plain", validate_default=True)


class Table(Schema):
    number: int = 1
    ratio: float = 0.5
    flag: bool = False
    one: Slot[Part, Literal["wide"]] = Field(default={}, validate_default=True)
    many: Tiled[Part] = Field(default="plain", validate_default=True)
    maybe: Tiled[Part, None] = Field(default=None, validate_default=True)


@pytest.fixture(autouse=True)
def catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "_active", {"part": {"plain": Plain, "wide": Wide}})


def problems(**data: Any) -> dict[str, str]:
    with pytest.raises(ValidationError) as error:
        Table.model_validate(data)
    return {".".join(map(str, detail["loc"])): detail["msg"] for detail in error.value.errors()}


def test_a_bare_name_and_a_mapping_mean_the_same() -> None:
    assert Table.model_validate({"one": "wide"}) == Table.model_validate({"one": {"kind": "wide", "window": 4}})


def test_the_default_kind_is_meant_when_none_is_given() -> None:
    assert Table.model_validate({"one": {"window": 9}}).one == Wide(window=9)


def test_a_list_is_tiled_and_a_single_part_is_a_tuple_of_one() -> None:
    table = Table.model_validate({"many": ["wide", {"kind": "plain"}]})
    assert [part.kind for part in table.many] == ["wide", "plain"]
    assert [part.kind for part in Table().many] == ["plain"]


def test_null_is_allowed_only_where_the_slot_says_so() -> None:
    assert Table.model_validate({"maybe": [None, "wide"]}).maybe[0] is None
    assert "many.0" in problems(many=[None])


def test_what_is_dumped_reads_back_equal() -> None:
    table = Table.model_validate({"many": ["wide", "plain"], "maybe": [None, "wide"], "one": {"window": 2}})
    assert Table.model_validate(table.model_dump()) == table


@pytest.mark.parametrize("value", [True, "3", 2.5, None])
def test_only_numbers_pass_as_integers(value: object) -> None:
    assert "number" in problems(number=value)


def test_an_integral_float_is_an_integer_and_an_integer_a_float() -> None:
    table = Table.model_validate({"number": 1e6, "ratio": 2})
    assert (table.number, type(table.number)) == (1_000_000, int)
    assert (table.ratio, type(table.ratio)) == (2.0, float)


def test_errors_inside_nested_parts_keep_their_path() -> None:
    found = problems(many=["wide", {"kind": "wide", "windw": 1}], one={"inner": {"kind": "wide", "window": 0}})
    assert set(found) == {"many.1.windw", "one.inner.window"}


def test_an_unknown_kind_names_what_there_is_and_the_nearest() -> None:
    assert problems(one="wid")["one"] == "no part called 'wid' (have: plain, wide); did you mean 'wide'?"


def test_an_empty_list_is_refused() -> None:
    assert "empty" in problems(many=[])["many"]


def test_components_are_immutable() -> None:
    with pytest.raises(ValidationError):
        Wide().window = 3  # type: ignore[misc]


def test_the_json_schema_lists_every_kind_with_its_options() -> None:
    schema = json_schema(Table)
    assert schema["properties"]["one"]["$ref"] == "#/$defs/slot_part_wide"
    kinds = schema["$defs"]["slot_part"]["anyOf"]
    assert kinds[0] == {"enum": ["plain", "wide"]}
    wide = next(option for option in kinds if option.get("title") == "wide")
    assert wide["properties"]["kind"] == {"const": "wide"}
    assert wide["properties"]["window"]["description"] == "tokens"
    assert wide["properties"]["inner"]["$ref"] == "#/$defs/slot_part_plain"  # a part inside a part of its own slot
    assert "slot_part_plain" in schema["$defs"]


def test_the_json_schema_agrees_with_what_is_accepted() -> None:
    validator = pytest.importorskip("jsonschema", reason="needs jsonschema").Draft202012Validator(json_schema(Table))
    for data, fine in [
        ({"one": {"window": 3}, "many": ["wide", {"kind": "plain"}], "maybe": [None]}, True),
        ({"one": {"window": 0}}, False),
        ({"many": []}, False),
        ({"many": [{"kind": "wide", "windw": 1}]}, False),
    ]:
        assert validator.is_valid(data) is fine, data


def test_the_summary_is_the_docstrings_first_paragraph() -> None:
    assert Plain.summary() == "Nothing to set."
