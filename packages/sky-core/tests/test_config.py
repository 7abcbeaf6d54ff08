"""Run files: extends, overrides, plugins' sections, and errors that say everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from sky_core.config import merge, parse_run, read_run, run_json_schema
from sky_core.errors import ConfigError
from sky_core.yaml_file import dump_yaml, parse_value

BASE = """\
name: base
model: {n_layer: 2, n_head: 2, d_model: 32}
data: {kind: tokens, path: data/mine, sequence_length: 16}
train: {steps: 10, batch_tokens: 64}
optimizer: {kind: adamw, lr: 3e-4}
"""


@pytest.fixture(autouse=True)
def sandbox(sky_sandbox: Path) -> Path:
    (sky_sandbox / "base.yaml").write_text(BASE)
    return sky_sandbox


def errors(text: str, *overrides: str) -> list[str]:
    Path("run.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_run("run.yaml", overrides)
    return error.value.problems


def test_a_resolved_run_reads_back_equal() -> None:
    run = read_run("base.yaml")
    assert parse_run(parse_value(dump_yaml(run.as_dict()))) == run


def test_overrides_reach_into_parts_and_lists() -> None:
    run = read_run("base.yaml", ["model.attention=[full, full]", "model.n_layer=1e1", "optimizer.lr=2e-3", "out=x"])
    assert (run.model.n_layer, len(run.model.attention), run.optimizer.lr, run.out) == (10, 2, 2e-3, "x")


def test_an_override_below_a_bare_name_keeps_the_name() -> None:
    Path("bare.yaml").write_text(BASE.replace("{kind: adamw, lr: 3e-4}", "muon"))
    run = read_run("bare.yaml", ["optimizer.lr=0.5"])
    assert (run.optimizer.kind, run.optimizer.lr) == ("muon", 0.5)


def test_another_kind_replaces_the_part_instead_of_mixing_its_options() -> None:
    run = read_run("base.yaml", ["optimizer={kind: muon}"])
    assert run.optimizer.kind == "muon"
    assert run.optimizer.lr != 3e-4


def test_extends_lays_one_file_over_another() -> None:
    Path("wide.yaml").write_text("extends: base.yaml\nname: wide\nmodel: {d_model: 64}\n")
    run = read_run("wide.yaml")
    assert (run.name, run.model.d_model, run.model.n_layer) == ("wide", 64, 2)


def test_a_file_that_extends_itself_is_refused() -> None:
    Path("a.yaml").write_text("extends: b.yaml\n")
    Path("b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        read_run("a.yaml")


def test_every_problem_is_told_at_once_with_its_line_and_the_nearest_word() -> None:
    found = errors(
        "name: base\n"
        "model: {n_layers: 2, d_model: 32}\n"
        "data: {kind: token, path: x}\n"
        "train: {steps: ten, batch_tokens: 0, engine: {kind: local, zero: 2}}\n"
        "optimiser: adamw\n"
        "eval: {every: true}\n"
    )
    text = "\n".join(found)
    assert "run.yaml:2: model.n_layers: unknown key; did you mean 'n_layer'?" in text
    assert "run.yaml:3: data: no dataset called 'token'" in text
    assert "did you mean 'tokens'?" in text
    assert "run.yaml:4: train.steps: input should be a valid integer, got 'ten'" in text
    assert "run.yaml:4: train.batch_tokens: input should be greater than or equal to 1, got 0" in text
    assert "run.yaml:4: train.engine.zero: unknown key; keys here: kind" in text
    assert "run.yaml:5: optimiser: unknown key; did you mean 'optimizer'?" in text
    assert "run.yaml:6: eval.every: input should be a valid integer, got True" in text


def test_a_missing_key_is_named() -> None:
    assert "train: this key is needed" in "\n".join(
        errors("name: x\ndata: {kind: tokens, path: x, sequence_length: 4}\n")
    )


def test_an_error_in_an_override_says_so() -> None:
    assert errors(BASE, "model.n_layr=3") == ["command line: model.n_layr: unknown key; did you mean 'n_layer'?"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.n_layer", "an override is written key=value"),
        ("seed.x.y=1", "has no keys"),
        ("callbacks.3.patience=1", "the list has 0 entries"),
    ],
)
def test_overrides_that_cannot_be_applied(override: str, message: str) -> None:
    assert message in "\n".join(errors(BASE + "seed: 3\ncallbacks: []\n", override))


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere.yaml: there is no such file$"):
        read_run("nowhere.yaml")


def test_merge_keeps_what_is_not_named() -> None:
    assert merge({"a": {"kind": "x", "b": 1}, "c": 2}, {"a": {"b": 3}}) == {"a": {"kind": "x", "b": 3}, "c": 2}
    assert merge({"a": {"kind": "x", "b": 1}}, {"a": {"kind": "y"}}) == {"a": {"kind": "y"}}


def test_the_json_schema_accepts_the_run_file_and_refuses_a_typo() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    validator = jsonschema.Draft202012Validator(run_json_schema())
    data = parse_value(BASE)
    assert validator.is_valid(data)
    assert not validator.is_valid(data | {"modle": {}})
    assert not validator.is_valid(data | {"model": {"n_layer": 0}})


SECTION_PLUGIN = """\
from typing import Annotated, ClassVar
from pydantic import Field
from sky_core import hookimpl, slots
from sky_core.errors import ConfigError

class Maps(slots.Section):
    "Attention maps while training."
    kind: ClassVar = "attention_maps"
    every: Annotated[int, Field(ge=1, description="steps")] = 100

@hookimpl
def sky_sections():
    return [Maps]

@hookimpl
def sky_configured(run):
    if run.section("attention_maps") and run.section("attention_maps").every > run.train.steps:
        raise ConfigError("attention_maps.every: larger than train.steps")
"""


def test_a_plugins_own_table_is_validated_like_the_rest() -> None:
    Path("maps.py").write_text(SECTION_PLUGIN)
    text = BASE + "plugins: [./maps.py]\n"
    Path("run.yaml").write_text(text + "attention_maps: {every: 5}\n")
    assert read_run("run.yaml").section("attention_maps").every == 5
    assert "attention_maps.evry: unknown key; did you mean 'every'?" in errors(text + "attention_maps: {evry: 5}\n")[0]
    assert errors(text + "attention_maps: {every: 50}\n") == ["attention_maps.every: larger than train.steps"]
    assert "attention_maps: unknown key" in errors(BASE + "attention_maps: {every: 5}\n")[0]


def test_options_of_a_default_part_can_be_set_without_naming_it() -> None:
    run = read_run("base.yaml", ["model.position.theta=1e5", "model.norm.eps=1e-3", "train.engine.kind=local"])
    assert (run.model.position[0].kind, run.model.position[0].theta, run.model.norm.eps) == ("rope", 1e5, 1e-3)


def test_a_typo_inside_a_part_that_may_be_tiled_is_placed_where_it_stands() -> None:
    found = errors(BASE, "model.position={kind: rope, thta: 3}")
    assert found == ["command line: model.position.thta: unknown key; did you mean 'theta'?"]
    assert "model.position.1.thta" in errors(BASE, "model.position=[rope, {kind: rope, thta: 3}]")[0]


def test_an_override_that_is_no_yaml_is_one_line() -> None:
    assert errors(BASE, "name=[1")[0].startswith("'name=[1': the value is no YAML")


def test_an_entry_of_a_list_that_the_file_does_not_have_is_refused() -> None:
    assert "write the whole list" in errors(BASE, "eval.tasks.0.batch_tokens=3")[0]


def test_a_sequence_longer_than_the_context_is_refused_at_once() -> None:
    assert (
        "64 tokens do not fit model.max_length=32" in errors(BASE, "data.sequence_length=64", "model.max_length=32")[0]
    )


@pytest.mark.parametrize(
    ("scaling", "problem"),
    [
        (
            "yran",
            "scaling: no scaling of rope called 'yran' (have: linear, dynamic, llama3, yarn); did you mean 'yarn'?",
        ),
        ("{factor: 4}", "scaling: which scaling? give 'kind' (have: linear, dynamic, llama3, yarn)"),
        ("{kind: llama3, factor: 4}", "scaling.original_length: this key is needed"),
        ("yarn", "scaling.factor: this key is needed"),
        (
            "{kind: yarn, factor: 4, original_length: 64, beta_fsat: 3}",
            "scaling.beta_fsat: unknown key; did you mean 'beta_fast'?",
        ),
        ("{kind: linear, factor: 0.5}", "scaling.factor: input should be greater than or equal to 1, got 0.5"),
        (
            "{kind: llama3, factor: 4, original_length: 64, low_freq_factor: 4}",
            "scaling: low_freq_factor 4.0 must be less than high_freq_factor 4.0",
        ),
    ],
)
def test_a_wrong_scaling_of_rope_is_told_of_its_own_kind(scaling: str, problem: str) -> None:
    assert any(f"model.position.{problem}" in line for line in errors(BASE, f"model.position.scaling={scaling}"))


def test_a_scaling_of_rope_reads_back_equal_and_stands_in_the_schema() -> None:
    run = read_run("base.yaml", ["model.position={kind: rope, scaling: {kind: yarn, factor: 4, original_length: 64}}"])
    assert parse_run(parse_value(dump_yaml(run.as_dict()))) == run
    assert run.as_dict()["model"]["position"]["scaling"]["kind"] == "yarn"
    assert {"LinearScaling", "DynamicScaling", "Llama3Scaling", "YarnScaling"} <= run_json_schema()["$defs"].keys()
