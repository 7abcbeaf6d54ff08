"""Run-file YAML: scalars of YAML 1.2, no double keys, and the line of every key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sky_core.errors import ConfigError
from sky_core.yaml_file import dump_yaml, parse_value, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1e6", 1e6), ("1_000", 1000), ("0x10", 16), ("-3", -3), (".5", 0.5), ("1.", 1.0),
        ("true", True), ("on", "on"), ("yes", "yes"), ("no", "no"), ("null", None), ("1:30", "1:30"), ("v1.2", "v1.2"),
        ("[a, 2]", ["a", 2]), (".inf", float("inf")),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@given(st.dictionaries(st.text(min_size=1), json_values))
def test_what_is_dumped_reads_back_equal(data: dict[str, object]) -> None:
    read = parse_value(dump_yaml(data))
    assert read == data
    assert repr(read) == repr(data)  # 1 and 1.0 are equal but not the same


def test_a_key_that_stands_twice_is_an_error_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(ConfigError, match=r"run.yaml:3: the key 'a' stands twice"):
        read_yaml(file)


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a: 1\nb: [1, 2\nc: 3\n")
    with pytest.raises(ConfigError, match=r"run.yaml:3: "):
        read_yaml(file)


def test_lines_of_nested_keys(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a:\n  b:\n    - c: 1\n    - d: 2\n")
    lines = read_yaml(file)[1]
    assert lines[("a", "b", 1, "d")].endswith(":4")


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "just text"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match="a mapping of keys is needed"):
        read_yaml(file)
