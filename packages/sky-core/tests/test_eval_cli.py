"""`sky eval`: a table on stdout, an event in the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sky_core import api, run_directory
from sky_core.cli.eval import evaluate, measure
from sky_core.components.evaluation import LossEval
from sky_core.data.dataset import Dataset
from sky_core.errors import DataError, UserError
from sky_core.eval.loss import validation_loss
from sky_core.model.language_model import LanguageModel
from sky_core.run_directory import RunDirectory
from sky_core.slots import Eval
from sky_core.tokenizer.byte import ByteTokenizer


class Constant(Eval):
    """A number that is always the same."""

    kind = "constant"

    def build(self) -> Callable[..., dict[str, float]]:
        return lambda model, tokenizer, dataset, autocast: {"constant": 0.5}


@pytest.fixture
def a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: LanguageModel, tiny_dataset: Dataset
) -> RunDirectory:
    folder = tmp_path / "checkpoints" / "step_000040"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").write_text("{}")
    (folder.parent / "best").symlink_to(folder.name)
    config: Any = SimpleNamespace(
        seed=1,
        tokenizer=None,
        data=SimpleNamespace(build=lambda seed, tokenizer: tiny_dataset),
        train=SimpleNamespace(precision="fp32"),
        eval=SimpleNamespace(tasks=[LossEval(batch_tokens=16), Constant()]),
    )
    monkeypatch.setattr(RunDirectory, "config", config)
    monkeypatch.setattr(run_directory, "find_run", lambda source: (RunDirectory(tmp_path), "best"))
    monkeypatch.setattr(api, "load", lambda source: (tiny_model, tiny_dataset.tokenizer))
    return RunDirectory(tmp_path)


def test_the_numbers_are_printed_and_kept(a_run: RunDirectory, tiny_model: Any, tiny_dataset: Dataset) -> None:
    expected = validation_loss(tiny_model, tiny_dataset.tokenizer, tiny_dataset, batch_tokens=16) | {"constant": 0.5}
    printed = CliRunner().invoke(evaluate, ["a@best", "--json"], catch_exceptions=False)
    numbers = json.loads(printed.stdout)
    assert numbers.pop("precision") == "fp32"
    assert numbers == pytest.approx(expected)
    [event] = a_run.events()
    assert (event["event"], event["step"], event["checkpoint"]) == ("eval", 40, "step_000040")
    assert {name: event[name] for name in expected} == pytest.approx(expected)


def test_the_table_names_the_units_and_the_standard_errors(a_run: RunDirectory) -> None:
    printed = CliRunner().invoke(evaluate, ["a"], catch_exceptions=False).stdout
    head, *lines, precision = printed.splitlines()
    assert head.split() == ["task", "metric", "value", "±", "s.e.", "n"]
    assert [line.split()[1] for line in lines[:5]] == ["nats/token", "perplexity", "bits/byte", "bytes", "tokens"]
    assert all(line.startswith("validation ") for line in lines[:5])
    assert [len(line.split()) for line in lines[:3]] == [5, 5, 5], "each with its standard error and its sequences"
    assert lines[5].split() == ["constant", "0.5000"]
    assert precision.split() == ["precision", "fp32"]


def test_data_of_another_tokenizer_is_refused(
    a_run: RunDirectory, monkeypatch: pytest.MonkeyPatch, tiny_model: LanguageModel
) -> None:
    monkeypatch.setattr(api, "load", lambda source: (tiny_model, ByteTokenizer(end_of_text=False)))
    with pytest.raises(DataError, match="another tokenizer"):
        CliRunner().invoke(evaluate, ["a"], catch_exceptions=False)
    assert a_run.events() == []


def test_it_measures_in_the_precision_of_training(a_run: RunDirectory, tiny_model: Any, tiny_dataset: Dataset) -> None:
    def bf16() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    expected = validation_loss(tiny_model, tiny_dataset.tokenizer, tiny_dataset, bf16, batch_tokens=16)
    a_run.config.train.precision = "bf16"
    numbers = json.loads(CliRunner().invoke(evaluate, ["a", "--json"], catch_exceptions=False).stdout)
    assert numbers["precision"] == "bf16"
    assert numbers["loss"] == expected["loss"]
    assert numbers["loss"] != validation_loss(tiny_model, tiny_dataset.tokenizer, tiny_dataset)["loss"]


def run_eval(*arguments: str) -> Any:
    return CliRunner().invoke(evaluate, ["a", *arguments], catch_exceptions=False)


def test_the_table_is_kept_beside_the_events(a_run: RunDirectory) -> None:
    printed = run_eval("--json")
    kept = json.loads((a_run.path / "evals" / "step_000040.json").read_text())
    assert kept["checkpoint"] == "step_000040"
    assert kept["results"] == json.loads(printed.stdout)
    [loss] = [line for line in kept["table"] if line["metric"] == "nats/token"]
    assert (loss["value"], loss["stderr"]) == (kept["results"]["loss"], kept["results"]["loss_stderr"])
    markdown = (a_run.path / "evals" / "step_000040.md").read_text()
    assert "| validation | nats/token |" in markdown
    assert "Computed in fp32." in markdown
    assert "evals/step_000040.md" in printed.stderr


def test_evaluating_again_adds_to_the_table_of_the_same_weights(a_run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"good": "the cat", "bad": "cat the"}\n{"good": "a", "bad": "b"}\n')
    run_eval()
    run_eval("--task", "minimal_pairs", "--data", str(tmp_path / "pairs.jsonl"))
    table = a_run.path / "evals" / "step_000040.json"
    kept = json.loads(table.read_text())["results"]
    assert "loss" in kept
    assert kept["minimal_pairs/items"] == 2
    (tmp_path / "pairs.jsonl").write_text('{"good": "the cat", "bad": "cat the"}\n')
    run_eval("--task", "minimal_pairs", "--data", str(tmp_path / "pairs.jsonl"))
    kept = json.loads(table.read_text())["results"]
    assert "loss_stderr" in kept
    assert "minimal_pairs/accuracy_stderr" not in kept, "nothing is left of what was measured anew"
    (a_run.path / "checkpoints" / "step_000040" / "MANIFEST.json").write_text('{"trained": "anew"}')
    run_eval("--task", "minimal_pairs", "--data", str(tmp_path / "pairs.jsonl"))
    assert "loss" not in json.loads(table.read_text())["results"]
    assert len(a_run.events()) == 4


def test_tasks_are_chosen_by_kind(a_run: RunDirectory) -> None:
    assert set(json.loads(run_eval("--task", "constant", "--json").stdout)) == {"constant", "precision"}
    assert "loss" in json.loads(run_eval("--task", "loss,constant", "--json").stdout)


def test_files_alone_are_domains(a_run: RunDirectory, tmp_path: Path) -> None:
    for name in ("web", "code"):
        (tmp_path / f"{name}.txt").write_text(f"some text of the {name} to be read")
    found = json.loads(
        run_eval("--data", str(tmp_path / "web.txt"), "--data", str(tmp_path / "code.txt"), "--json").stdout
    )
    assert {"domains/web/bits_per_byte", "domains/code/bits_per_byte"} < set(found)


def test_what_needs_no_data_does_not_open_it(a_run: RunDirectory, tmp_path: Path) -> None:
    def build(seed: int, tokenizer: Any) -> None:
        raise AssertionError("the data was opened")

    a_run.config.data.build = build
    (tmp_path / "words.txt").write_text("word " * 40 + "last")
    assert "last_word/accuracy" in json.loads(
        run_eval("--task", "last_word", "--data", str(tmp_path / "words.txt"), "--json").stdout
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--task", "last_wrd"], r"no evaluation called 'last_wrd'.*did you mean 'last_word'"),
        (["--task", "last_word"], r"does not configure the evaluation 'last_word'; give --data FILE"),
        (["--task", "lm_eval"], r"put it into eval.tasks with tasks"),
        (["--task", "loss", "--data", "x.txt"], r"'loss' takes no --data"),
        (["--include-path", "tasks"], r"--lm-eval TASK"),
        (["--task", "cloze,cloze", "--data", "cloze.jsonl"], r"two evaluations report 'cloze/accuracy'"),
        (["--task", "cloze", "--data", "nowhere.jsonl"], r"nowhere.jsonl: no such file"),
    ],
)
def test_what_cannot_be_measured_is_said_and_nothing_is_written(
    a_run: RunDirectory, arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cloze.jsonl").write_text('{"context": "one two", "choices": ["three", "ten"], "answer": 0}\n')
    with pytest.raises(UserError, match=complaint):
        run_eval(*arguments)
    assert a_run.events() == []
    assert not (a_run.path / "evals").exists()


def test_a_model_without_a_run_is_measured_on_files(
    a_run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some text to be read")
    found = measure("hf:folder", data=[str(tmp_path / "text.txt")])
    assert found["domains/text/bytes"] == 20
    with pytest.raises(UserError, match="hf:folder: this model has no run directory"):
        measure("hf:folder")
    assert a_run.events() == []
