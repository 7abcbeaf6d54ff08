"""Evaluations of files in a run file: measured while training, noted, and without a trace in the losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sky_core.errors import ConfigError, DataError


@pytest.fixture
def tasks(lab: Any) -> list[Any]:
    Path("book.txt").write_text("the cat sat on the mat.\n\na dog and a cat sat on the log.\n")
    Path("cloze.jsonl").write_text('{"context": "the cat", "choices": ["sat", "zzz"], "answer": 0}\n' * 2)
    Path("pairs.jsonl").write_text('{"good": "the cat", "bad": "the xqz"}\n' * 2)
    return [
        "loss",
        {"kind": "domains", "path": {"book": "book.txt"}},
        {"kind": "last_word", "path": "book.txt", "min_words": 3},
        {"kind": "cloze", "path": "cloze.jsonl"},
        {"kind": "cloze", "path": "cloze.jsonl", "name": "again", "max_items": 1},
        {"kind": "minimal_pairs", "path": "pairs.jsonl"},
    ]


def test_a_run_file_may_ask_for_all_of_them(lab: Any, tasks: list[Any]) -> None:
    plain = lab.train()
    lab.write(eval={"every": 2, "tasks": tasks})
    result = lab.train()
    events = [json.loads(line) for line in (result.directory / "events.jsonl").read_text().splitlines()]
    measured = [event for event in events if event["event"] == "eval"]
    assert [event["step"] for event in measured] == [2, 4, 6]
    for event in measured:
        assert event["last_word/items"] == event["minimal_pairs/items"] == event["cloze/items"] == 2
        assert event["again/items"] == 1
        assert {"last_word/accuracy_stderr", "cloze/accuracy_norm", "domains/book/bits_per_byte"} < set(event)
    assert lab.tensors(result.directory) == lab.tensors(plain.directory), "looking changes no bit of the run"


def test_two_of_one_name_are_refused(lab: Any, tasks: list[Any]) -> None:
    lab.write(eval={"tasks": [*tasks, {"kind": "minimal_pairs", "path": "pairs.jsonl"}]})
    with pytest.raises(ConfigError, match=r"eval\.tasks.*two evaluations are called 'minimal_pairs'"):
        lab.train()


def test_sky_eval_repeats_what_training_said(lab: Any, tasks: list[Any]) -> None:
    lab.write(eval={"tasks": tasks})
    result = lab.train()
    told = lab.sky("eval", result.directory, "--json")
    again = json.loads(told.out)
    assert again.pop("precision") == "fp32"
    assert again == pytest.approx(result.evaluation, rel=1e-6)
    table = lab.sky("eval", result.directory, "--task", "again,last_word").out
    assert [line.split()[0] for line in table.splitlines()[1:-1]] == ["again"] * 3 + ["last_word"] * 3


def test_a_missing_file_is_one_line(lab: Any) -> None:
    lab.write(eval={"tasks": [{"kind": "last_word", "path": "bok.txt"}]})
    Path("book.txt").write_text("text")
    with pytest.raises(DataError, match=r"bok.txt: no such file or folder; did you mean 'book.txt'"):
        lab.train()
