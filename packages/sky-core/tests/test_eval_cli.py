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
from sky_core.cli.eval import evaluate
from sky_core.components.evaluation import LossEval
from sky_core.data.dataset import Dataset
from sky_core.errors import DataError
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
    expected = validation_loss(tiny_model, tiny_dataset.tokenizer, tiny_dataset) | {"constant": 0.5}
    printed = CliRunner().invoke(evaluate, ["a@best", "--json"], catch_exceptions=False)
    numbers = json.loads(printed.stdout)
    assert numbers.pop("precision") == "fp32"
    assert numbers == pytest.approx(expected)
    [event] = a_run.events()
    assert (event["event"], event["step"], event["checkpoint"]) == ("eval", 40, "step_000040")
    assert {name: event[name] for name in expected} == pytest.approx(expected)


def test_the_table_names_the_units(a_run: RunDirectory) -> None:
    printed = CliRunner().invoke(evaluate, ["a"], catch_exceptions=False).stdout
    words = [line.split()[0] for line in printed.splitlines()]
    assert words == ["nats/token", "perplexity", "bits/byte", "tokens", "bytes", "constant", "precision"]


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
