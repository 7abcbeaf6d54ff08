"""`sky quickstart`: it ends in time with an evaluation on any machine, and stops as every run does."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from sky_core.cli import quickstart
from sky_core.config import read_run

RUN_FILE = Path(quickstart.__file__).parents[1] / "quickstart.yaml"

TINY = (
    "plugins=[]", "tokenizer=byte", "model.n_layer=1", "model.d_model=16", "model.n_head=2", "data.path=corpus.txt",
    "data.split=position", "data.sequence_length=16", "train.batch_tokens=64", "sample.max_new_tokens=2",
)  # fmt: skip


def chosen(monkeypatch: pytest.MonkeyPatch, seconds: float, *given: str) -> dict[str, str]:
    """The overrides on a machine where a step of 4096 tokens takes that long."""
    monkeypatch.setattr(quickstart, "seconds_per_step", lambda run: seconds)
    overrides = quickstart.fitting(read_run(RUN_FILE, given), given)
    return dict(override.split("=") for override in overrides)


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.5, 1.7, 5.0, 14.0])
def test_training_takes_two_minutes_on_any_machine(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    found = chosen(monkeypatch, seconds)
    steps, tokens = int(found["train.steps"]), int(found["train.batch_tokens"])
    assert quickstart.FEWEST <= steps <= quickstart.MOST
    assert steps * seconds * tokens / 4096 <= 110
    assert steps == quickstart.MOST or steps * seconds * tokens / 4096 > 40
    assert tokens % 128 == 0
    assert 2 <= steps / int(found["eval.every"]) <= 3


def test_what_the_user_asks_for_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, 10.0, "train.steps=5")["train.steps"] == "5"
    assert chosen(monkeypatch, 10.0, "train.batch_tokens=2048")["train.batch_tokens"] == "2048"


def test_the_probe_times_a_step_and_leaves_nothing(lab: Any) -> None:
    lab.monkeypatch.setattr(quickstart, "PROBE_SECONDS", 0.05)
    assert 0 < quickstart.seconds_per_step(read_run(RUN_FILE, TINY)) < 10
    assert not Path("runs").exists()


def test_it_trains_evaluates_samples_and_says_what_to_type_next(lab: Any) -> None:
    lab.monkeypatch.setattr(quickstart, "PROBE_SECONDS", 0.05)
    lab.monkeypatch.setattr(quickstart, "MOST", 4)
    lab.monkeypatch.setattr(quickstart, "FEWEST", 2)
    told = lab.sky("quickstart", *TINY)
    assert told.code == 0, told.err
    assert re.search(r"^this machine: [\d,]+ tokens/s: 4 steps, \d\.\d minutes$", told.err, re.M)
    assert re.match(r"task .*\nvalidation  nats/token ", told.out)
    assert [prompt for prompt in quickstart.PROMPTS if f"--- {prompt!r}" in told.out] == list(quickstart.PROMPTS)
    (run,) = Path("runs").iterdir()
    assert "done at step 4\n" in told.out
    assert f"sky resume {run} train.steps=8 " in told.out
    assert len((run / "events.jsonl").read_text().splitlines()) >= 2


def test_a_run_that_time_cuts_short_is_evaluated_all_the_same(lab: Any) -> None:
    told = lab.sky("quickstart", *TINY, "train.steps=1000", "train.max_minutes=1e-9")
    assert told.code == 0, told.err
    assert re.match(r"task .*\nvalidation  nats/token ", told.out)
    assert "stopped at step 1 (max_minutes" in told.out


def test_ctrl_c_saves_and_exits_with_130_without_samples(lab: Any) -> None:
    with lab.during(2, lambda trainer: os.kill(os.getpid(), signal.SIGINT)):
        told = lab.sky("quickstart", *TINY, "train.steps=1000")
    (run,) = Path("runs").iterdir()
    assert told.code == 130
    assert f"resume   sky resume {run}" in told.out
    assert "---" not in told.out
    assert lab.steps(run) == [2]


def test_a_shell_that_does_not_find_the_command_is_told_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "activate").touch()
    monkeypatch.setattr("sys.argv", [str(tmp_path / "sky")])
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert quickstart.activation() == f"  source {tmp_path / 'activate'}      once in each terminal\n"
    monkeypatch.setattr("shutil.which", lambda name: "/bin/sky")
    assert quickstart.activation() == ""
