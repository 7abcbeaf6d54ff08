"""The `sky` command: what goes where, which exit code, and what each command says."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from sky_core.cli.main import COMMANDS, app


def walk(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and sub-command."""
    context = click.Context(command)
    if not isinstance(command, click.Group):
        return [path]
    below = [
        found
        for name in command.list_commands(context)
        if (one := command.get_command(context, name)) is not None
        for found in walk(one, (*path, name))
    ]
    return [path, *below]


# --------------------------------------------------------------------------------------------- help and mistakes


def test_every_command_explains_itself_and_each_of_its_options(lab: Any) -> None:
    paths = walk(app)
    assert {path[0] for path in paths if path} == set(COMMANDS)
    for path in paths:
        told = lab.sky(*path, "--help")
        assert (told.code, told.err) == (0, ""), path
        assert f"Usage: {' '.join(('sky', *path))}" in told.out
        assert "-h, --help" in told.out


def test_help_lists_the_commands_with_their_summaries(lab: Any) -> None:
    out = " ".join(lab.sky("--help").out.split())
    for name, (_, summary) in COMMANDS.items():
        assert f"{name} {summary}" in out
    version = lab.sky("--version").out
    assert re.fullmatch(r"sky, version \d+\.\d+\.\d+\n", version)


def test_without_a_command_comes_the_help(lab: Any) -> None:
    told = lab.sky()
    assert "Usage: sky" in told.out + told.err
    assert told.errors == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian", "run.yaml"], "sky: No such command 'trian'; did you mean 'train'?; see: sky --help"),
        (["train"], "sky: Missing argument 'RUN_FILE'; see: sky train --help"),
        (["runs", "--sort", "size"], "sky: Invalid value for '--sort': 'size' is not one of"),
        (["sample", "x", "--n", "0"], "sky: Invalid value for '--n': 0 is not in the range x>=1"),
        (["train", "nowhere.yaml"], "sky: nowhere.yaml: there is no such file"),
        (["train", "run.yaml", "seed"], "sky: 'seed': an override is written key=value, as in model.n_layer=6"),
        (["train", "run.yaml", "seed=x"], "sky: command line: seed: input should be a valid integer, got 'x'"),
        (["train", "run.yaml", "sead=1"], "sky: command line: sead: unknown key; did you mean 'seed'?"),
        (["sample", "nothing"], "sky: 'nothing': no such directory, and there are no runs in runs/"),
        (["resume", "nothing"], "sky: 'nothing': no such directory, and there are no runs in runs/"),
        (["eval", "nothing"], "sky: 'nothing': no such directory, and there are no runs in runs/"),
        (["runs", "nothing"], "sky: 'nothing': no such directory, and there are no runs in runs/"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_users_mistakes_are_one_line_and_exit_code_2(lab: Any, arguments: list[str], line: str) -> None:
    told = lab.sky(*arguments)
    assert (told.code, told.out) == (2, "")
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith(line)
    assert not Path("runs").exists()


def test_a_bug_is_one_line_without_debug_and_a_traceback_with_it(lab: Any) -> None:
    from sky_core import api

    def bug(*_: Any) -> Any:
        raise ZeroDivisionError("division\nby zero")

    lab.monkeypatch.setattr(api, "train", bug)
    told = lab.sky("train", "run.yaml")
    line = "sky: ZeroDivisionError: division by zero (this is a bug; --debug shows where)"
    assert (told.code, told.err.splitlines()) == (1, [line])
    for arguments in (["--debug", "train", "run.yaml"], ["train", "run.yaml", "--debug"]):
        told = lab.sky(*arguments)
        assert told.code == 1
        assert "Traceback (most recent call last)" in told.err
        assert told.errors == [line]


def test_debug_keeps_the_exit_code(lab: Any) -> None:
    told = lab.sky("train", "nowhere.yaml", "--debug")
    assert told.code == 2
    assert "Traceback" in told.err


def test_what_the_system_refuses_is_one_line_and_no_bug(lab: Any) -> None:
    Path("taken").write_text("a file")
    told = lab.sky("train", "run.yaml", "out=taken")
    assert told.code == 1
    assert len(told.errors) == 1
    assert "taken" in told.errors[0]
    assert "this is a bug" not in told.err


# ------------------------------------------------------------------------------------------------ what goes where


def test_stdout_carries_the_result_and_stderr_the_progress(lab: Any) -> None:
    told = lab.sky("train", "run.yaml")
    (run,) = Path("runs").iterdir()
    assert told.code == 0
    first, *rest = told.out.splitlines()
    assert re.fullmatch(r"done at step 6; validation: loss \d\.\d{4}, perplexity [\d.]+, bits_per_byte [\d.]+", first)
    assert rest == [f"run      {run}", f'sample   sky sample {run} --prompt "..."']
    assert "step  6/6" in told.err
    assert "★ best" in told.err
    assert "\x1b" not in told.err + told.out, "escape codes where there is no terminal"
    assert "done at step 6" in (run / "log.txt").read_text()


def test_json_results_are_json_and_nothing_else(lab: Any) -> None:
    trained = json.loads(lab.sky("train", "run.yaml", "--json").out)
    assert (trained["state"], trained["step"], trained["signal"]) == ("done", 6, None)
    run = trained["directory"]
    assert Path(run).is_dir()
    assert trained["evaluation"]["loss"] > 0
    resumed = json.loads(lab.sky("resume", run, "train.steps=7", "--json").out)
    assert resumed["step"] == 7
    sampled = json.loads(lab.sky("sample", run, "--prompt", "a", "--max-new-tokens", "2", "--json").out)
    assert sampled[0]["prompt"] == "a"
    measured = json.loads(lab.sky("eval", run, "--json").out)
    assert measured["loss"] == pytest.approx(resumed["evaluation"]["loss"], rel=1e-6)


def test_a_reader_that_leaves_early_gets_no_traceback(lab: Any) -> None:
    environment = os.environ | {"SKY_PLUGINS": ""}
    command = [sys.executable, "-m", "sky_core", "schema"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) in (0, 1)


def test_on_a_terminal_progress_is_live_and_no_color_has_no_colours(lab: Any) -> None:
    from rich.console import Console

    from sky_core.training import report
    from sky_core.training.progress import LiveProgress, make_progress

    shown: list[Any] = []

    def on_terminal(total: int, *, quiet: bool) -> Any:
        console = Console(stderr=True, force_terminal=True, width=80)
        shown.append(make_progress(total, quiet=quiet, console=console))
        return shown[-1]

    lab.monkeypatch.setattr(report, "make_progress", on_terminal)
    lab.monkeypatch.setenv("TERM", "xterm-256color")
    lab.monkeypatch.delenv("NO_COLOR", raising=False)
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-9]|38;5;\d+|9[0-7])m")
    told = lab.sky("train", "run.yaml", "train.steps=2")
    assert isinstance(shown[0], LiveProgress)
    assert told.code == 0
    assert colour.search(told.err)
    assert "\x1b" not in told.out
    lab.monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(lab.sky("train", "run.yaml", "train.steps=2").err)


# ------------------------------------------------------------------------------------- show, check, schema, plugins


def test_check_says_fine_or_every_problem(lab: Any) -> None:
    assert lab.sky("check", "run.yaml").out.startswith("run.yaml: fine (")
    told = lab.sky("check", "run.yaml", "model.n_layr=2", "train.steps=0", "optimizer=adam")
    assert (told.code, told.out) == (2, "")
    assert len(told.errors) == 3
    assert told.err.splitlines() == told.errors


def test_show_names_every_part_and_where_its_code_is(lab: Any) -> None:
    told = lab.sky("show", "run.yaml", "--json")
    shown = json.loads(told.out)
    paths = {row["path"]: row for row in shown["components"]}
    assert {"model", "model.attention", "model.feedforward", "data", "tokenizer", "optimizer", "train"} <= paths.keys()
    for row in paths.values():
        file, _, line = row["where"].rpartition(":")
        found = Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(rf"(class|def) {row['class'].rpartition('.')[2]}\b", found), (row, found)
    assert paths["model"]["class"] == "sky_core.model.decoder.DecoderLM"
    assert paths["train"]["class"] == "sky_core.training.trainer.Trainer"
    assert paths["train.engine"]["class"] == "sky_core.training.engine.LocalEngine"
    assert paths["model"]["options"]["d_model"] == 16
    assert any("arXiv" in row["paper"] for row in paths.values())


def test_show_counts_what_is_really_built(lab: Any) -> None:
    import sky_core

    sizes = json.loads(lab.sky("show", "run.yaml", "--json").out)["model"]
    model, tokenizer = sky_core.load(lab.train("train.steps=1").directory)
    assert sizes["parameters.total"] == sum(parameter.numel() for parameter in model.parameters())
    assert sizes["vocabulary"] == tokenizer.vocab_size
    assert sizes["bytes_to_train"][0]["bytes"] == 16 * sizes["parameters.total"]
    assert sizes["flops_per_token"] > 6 * sizes["parameters.body"]
    assert sizes["data.train"]["bytes"] > 0


def test_show_without_building_needs_no_data_and_reads_as_text(lab: Any) -> None:
    Path("corpus.txt").unlink()
    told = lab.sky("show", "run.yaml", "--no-build")
    assert told.code == 0
    lines = told.out.splitlines()
    assert lines[0].split()[:2] == ["model", "decoder"]
    assert any(re.search(r"sky_core\.model\.decoder\.DecoderLM", line) for line in lines)
    assert any(re.search(r"\S+decoder\.py:\d+$", line) for line in lines)
    assert "KV cache" not in told.out
    assert told.err == ""
    assert json.loads(lab.sky("show", "run.yaml", "--no-build", "--json").out)["model"] == {}


def test_show_points_into_a_loose_file(lab: Any) -> None:
    Path("mine.py").write_text(
        "from typing import ClassVar\n"
        "from sky_core import hookimpl, slots\n\n\n"
        "class Mine(slots.Callback):\n"
        '    "Nothing at all."\n'
        '    kind: ClassVar = "mine"\n'
        "    def build(self, trainer): return object()\n\n\n"
        "@hookimpl\n"
        "def sky_callbacks(): return [Mine]\n"
    )
    lab.write(plugins=["./mine.py"], callbacks=["mine"])
    rows = json.loads(lab.sky("show", "run.yaml", "--no-build", "--json").out)["components"]
    assert next(row for row in rows if row["kind"] == "mine")["where"] == "mine.py:5"


def test_the_schema_is_one_and_accepts_the_run_file(lab: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    from sky_core.yaml_file import read_yaml

    schema = json.loads(lab.sky("schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    data = read_yaml(Path("run.yaml"))[0]
    assert validator.is_valid(data)
    assert not validator.is_valid(data | {"trian": {}})
    assert lab.sky("schema", "--out", ".sky/schema.json").out == "wrote .sky/schema.json\n"
    assert json.loads(Path(".sky/schema.json").read_text()) == schema


def test_plugins_lists_what_is_offered_and_by_whom(lab: Any) -> None:
    (core,) = json.loads(lab.sky("plugins", "--json").out)
    assert (core["name"], core["status"]) == ("core", "active")
    assert "decoder" in core["offers"]["model"]
    assert "sky_models" in core["hooks"]
    text = lab.sky("plugins", "--hooks").out
    assert re.search(r"^core +sky-core \S+  active$", text, re.M)
    assert "decoder" in text
    assert "sky_models" in text


def test_doctor_tells_facts_and_fails_on_problems(lab: Any) -> None:
    from sky_core.cli import doctor

    lab.monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0, 0))
    told = lab.sky("doctor", "--json")
    report = json.loads(told.out)
    assert (told.code, report["problems"]) == (0, [])
    assert report["facts"]["precision"] in ("auto means fp32", "auto means bf16")
    assert report["facts"].keys() >= {"python", "torch", "processor", "device", "memory", "disk", "plugin core"}
    lab.monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0, 0))
    told = lab.sky("doctor")
    assert (told.code, told.errors) == (0, []), "a busy machine is not broken"
    assert "note             load is 99.0" in told.out
    lab.monkeypatch.setattr(doctor, "examine", lambda: ({}, [], ["plugin mine: no such module"]))
    told = lab.sky("doctor")
    assert (told.code, told.errors) == (4, ["sky: 1 problem found"])
    assert "problem          plugin mine: no such module" in told.out


# ----------------------------------------------------------------------------------------------------------- runs


def test_runs_lists_sorts_filters_and_compares(lab: Any) -> None:
    assert lab.sky("runs").out == "no runs in runs/\n"
    assert json.loads(lab.sky("runs", "--json").out) == []
    small = lab.train("name=small", "train.steps=1", "tags=[a]").directory
    large = lab.train("name=large", "model.d_model=32", "tags=[a, b]").directory
    bad = Path("runs/29991231-235959_bad-0000")
    bad.mkdir()
    (bad / "run.json").write_text(json.dumps({"name": "bad", "state": "failed", "reason": "no such\nthing"}))
    header, *told = lab.sky("runs").out.splitlines()
    lines = [line for line in told if not line.startswith("  why: ")]
    assert header.split()[:3] == ["run", "state", "step"]
    states = {line.split()[0].partition("_")[2].partition("-")[0]: line.split()[1:3] for line in lines}
    assert states == {"small": ["done", "1/1"], "large": ["done", "6/6"], "bad": ["failed", "-"]}
    (why,) = set(told) - set(lines)
    assert why == "  why: no such thing"
    assert told[told.index(why) - 1].startswith(next(line for line in lines if "_bad-" in line)), "below its run"
    rows = {row["id"]: row for row in json.loads(lab.sky("runs", "--json").out)}
    assert rows[small.name]["step"] == 1
    assert rows[large.name]["parameters"] > rows[small.name]["parameters"]
    assert rows[large.name]["bits_per_byte"] > 0
    assert rows[large.name]["tokens"] == 6 * 64

    def order(*arguments: str) -> list[str]:
        rows = json.loads(lab.sky("runs", "--json", *arguments).out)
        return [row["id"].partition("_")[2].partition("-")[0] for row in rows]

    assert order("--sort", "parameters") == ["small", "large", "bad"], "what is not known comes last"
    assert order("--sort", "loss") == ["large", "small", "bad"]
    assert order("--tag", "b") == ["large"]
    assert order("large", "small", "--sort", "step") == ["small", "large"]
    table = [line.split() for line in lab.sky("runs", "small", "large", "--diff").out.splitlines()]
    compared = table[table.index([]) + 1 :]
    assert compared[0] == [small.name, large.name]
    assert ["name", '"small"', '"large"'] in compared
    assert ["model.d_model", "16", "32"] in compared
    assert not any(line[0].startswith("seed") for line in compared)
    assert lab.sky("runs", "--out", "elsewhere").out == "no runs in elsewhere/\n"


def test_a_part_of_another_kind_is_one_difference(lab: Any) -> None:
    first = lab.train("name=first", "train.steps=1", "optimizer.lr=0.1").directory
    second = lab.train("name=second", "train.steps=1", "optimizer=muon", "schedule.warmup=0").directory
    table = [line.split() for line in lab.sky("runs", first, second, "--diff").out.splitlines()]
    assert ["optimizer", "adamw", "muon"] in table
    assert ["schedule.warmup", "0.02", "0"] in table or ["schedule.warmup", "0.02", "0.0"] in table
    assert not any(line and line[0].startswith("optimizer.") for line in table)


def test_long_reasons_are_shortened_and_a_live_run_shows_its_step(lab: Any) -> None:
    lab.monkeypatch.setenv("COLUMNS", "60")
    for name, fields in {
        "1_bad": {"state": "failed", "reason": "because " * 20},
        "2_live": {"state": "running", "pid": os.getpid(), "step": 1200, "steps": 12000, "train_loss": 4.5,
                   "tokens_per_second": 1740.2, "minutes": 12.1, "host": socket.gethostname()},
    }.items():  # fmt: skip
        (Path("runs") / name).mkdir(parents=True)
        (Path("runs") / name / "run.json").write_text(json.dumps(fields))
    _, _, why, live = lab.sky("runs").out.splitlines()
    assert why.startswith("  why: because")
    assert (len(why), why[-1]) == (60, "…")
    assert re.split(r"  +", live) == [
        "2_live",
        "running",
        "1 200/12 000",
        "-",
        "-",
        "4.5000",
        "1.74k",
        "-",
        "-",
        "12m06",
    ]


def test_plugins_add_commands(lab: Any) -> None:
    Path("hello.py").write_text(
        "import click\n"
        "from sky_core import hookimpl\n"
        "@click.command()\n"
        "def hello():\n"
        '    "Say hello."\n'
        "    click.echo('hello')\n"
        "@hookimpl\n"
        "def sky_commands(app):\n"
        "    app.add_command(hello)\n"
    )
    from sky_core.plugins import load_plugins

    load_plugins(["./hello.py"])
    lab.monkeypatch.setattr(app, "_plugins_asked", False)
    lab.monkeypatch.setattr(app, "commands", {})
    assert lab.sky("hello").out == "hello\n"
    assert re.search(r"hello +Say hello", lab.sky("--help").out)
