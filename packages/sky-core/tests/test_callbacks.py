"""Callbacks: what they hear, in which order, and the one that stops a run early."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sky_core.training.callbacks import EarlyStop

WITNESS = """
import json
from typing import Annotated, ClassVar
from pydantic import Field
from sky_core import hookimpl, slots

SEEN = []

class Witness:
    def __init__(self, trainer, path):
        self.trainer, self.path = trainer, path
    def say(self, *what):
        with open(self.path, "a") as file:
            file.write(json.dumps(what) + "\\n")
    def on_start(self): self.say("start", self.trainer.step)
    def on_step(self, step, metrics): self.say("step", step, sorted(metrics))
    def on_eval(self, step, results): self.say("eval", step, sorted(results))
    def on_save(self, step, path): self.say("save", step, path.name, (path / "MANIFEST.json").exists())
    def on_end(self, result): self.say("end", result.state, result.step)

class Said(slots.Callback):
    "Writes down what it is told."
    kind: ClassVar = "witness"
    path: Annotated[str, Field(description="file")] = "seen"
    def build(self, trainer): return Witness(trainer, self.path)

class Silent(slots.Callback):
    "Has no hook at all."
    kind: ClassVar = "silent"
    def build(self, trainer): return object()

@hookimpl
def sky_callbacks(): return [Said, Silent]

@hookimpl
def sky_trainer_built(trainer, run):
    trainer.callbacks.append(Witness(trainer, "built"))

@hookimpl
def sky_finished(run, result):
    Witness(None, "finished").say(run.name, result.state)
"""


def seen(path: str = "seen") -> list[list[Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def witness(lab: Any) -> None:
    Path("witness.py").write_text(WITNESS)
    lab.write(plugins=["./witness.py"], train={"steps": 3}, callbacks=["witness", "silent"])


@pytest.mark.usefixtures("witness")
def test_every_event_is_announced_in_order_with_what_the_slot_documents(lab: Any) -> None:
    lab.train()
    metrics = ["grad_norm", "loss", "lr", "skipped", "tokens"]
    named = ["bits_per_byte", "loss", "perplexity"]
    results = sorted(["bytes", "sequences", "tokens", *named, *(f"{name}_stderr" for name in named)])
    assert seen() == [
        ["start", 0],
        ["step", 1, metrics],
        ["step", 2, metrics],
        ["eval", 2, results],
        ["save", 2, "step_000002", True],
        ["step", 3, metrics],
        ["eval", 3, results],
        ["save", 3, "step_000003", True],
        ["end", "done", 3],
    ]
    assert seen("built") == seen(), "what a plugin appends in sky_trainer_built hears the same"
    assert seen("finished") == [["tiny", "done"]]


@pytest.mark.usefixtures("witness")
def test_the_end_is_announced_whatever_it_is(lab: Any) -> None:
    def fail(trainer: Any) -> None:
        raise ZeroDivisionError

    with lab.during(2, fail), pytest.raises(ZeroDivisionError):
        lab.train()
    assert seen()[-1] == ["end", "failed", 2]
    assert seen("finished") == [["tiny", "failed"]]


# -------------------------------------------------------------------------------------------------- early stopping


class Asked:
    """A trainer to ask."""

    def __init__(self) -> None:
        self.stopped: str | None = None

    def request_stop(self, reason: str, state: str) -> None:
        assert state == "done"
        self.stopped = reason


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "stops_at"),
    [
        ([3, 2, 1, 0], 1, 0.0, None),
        ([3, 3, 3, 3], 2, 0.0, 2),
        ([3, 4, 2, 3, 3, 3], 3, 0.0, 5),
        ([3.0, 2.95, 2.9, 2.85], 2, 0.2, 2),
        ([3.0, 2.9, 2.75, 2.9], 2, 0.2, None),
        ([math.nan, math.nan], 2, 0.0, 1),
    ],
)
def test_it_stops_after_patience_evaluations_without_a_new_best(
    losses: list[float], patience: int, min_delta: float, stops_at: int | None
) -> None:
    trainer = Asked()
    callback = EarlyStop(trainer, patience, min_delta)  # type: ignore[arg-type]
    for index, loss in enumerate(losses):
        callback.on_eval(index, {"loss": loss})
        if trainer.stopped:
            assert index == stops_at
            return
    assert stops_at is None


def validation(lab: Any, *losses: float) -> None:
    """The losses that the next evaluations find."""
    from sky_core.components.evaluation import LossEval

    coming = iter(losses)
    lab.monkeypatch.setattr(LossEval, "build", lambda self: lambda *_: {"loss": next(coming)})


def test_a_run_that_stops_early_is_done_and_saved(lab: Any) -> None:
    lab.write(eval={"every": 1}, checkpoint={"every": None}, train={"steps": 50})
    validation(lab, 5, 4, 4.5, 4.5, 4.5)
    result = lab.train("callbacks=[{kind: early_stop, patience: 2}]")
    assert (result.state, result.step) == ("done", 4)
    assert result.reason == "no lower validation loss in 2 evaluations"
    assert lab.steps(result.directory) == [2, 4]


def test_patience_is_counted_over_a_resume(lab: Any) -> None:
    lab.write(eval={"every": 1}, callbacks=[{"kind": "early_stop", "patience": 3}], train={"steps": 50})
    validation(lab, 5, 6, 6, 6, 1)
    with lab.during(3, lambda trainer: trainer.request_stop("enough")):
        run = lab.train().directory
    result = lab.resume(run)
    assert (result.state, result.step) == ("done", 4)


def test_early_stopping_without_a_loss_is_one_line(lab: Any) -> None:
    from sky_core.components.evaluation import LossEval

    lab.monkeypatch.setattr(LossEval, "build", lambda self: lambda *_: {"accuracy": 1.0})
    told = lab.sky("train", "run.yaml", "callbacks=[early_stop]")
    assert told.code == 2
    assert told.errors == ["sky: callbacks: early_stop watches the validation loss; add `loss` to eval.tasks"]
