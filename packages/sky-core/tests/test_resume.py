"""Resuming is exact: a run that was stopped, killed or taken up again ends with the very bits of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sky_core.errors import CheckpointError, UserError
from sky_core.training.trainer import Trainer


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the trainer would do on its way out happens."""


def die(trainer: Any) -> None:
    raise Killed


def stop(trainer: Any) -> None:
    trainer.request_stop("enough")


@pytest.fixture
def killing(lab: Any) -> Any:
    """killing(step, ...): a run that dies in that step and leaves what a killed process leaves."""

    def run(step: int, function: Any, *arguments: Any) -> None:
        with lab.monkeypatch.context() as patch, lab.during(step, die):
            patch.setattr(Trainer, "_fail", lambda *_: None)
            with pytest.raises(Killed):
                function(*arguments)

    return run


def newest() -> Path:
    return max(Path("runs").iterdir(), key=lambda path: path.stat().st_ctime_ns)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["train.micro_batch=1", "train.ema=0.5"],
        ["optimizer={kind: muon, lr: 0.02}", "schedule={kind: wsd, warmup: 2}"],
        ["train.activation_checkpointing=true", "optimizer={kind: adamw, fused: false}"],
        ["data.documents=mask", "data.packing=best_fit", "train.clip=0.01"],
    ],
    ids=["dropout", "accumulation and average", "muon", "recomputed activations", "packed documents"],
)
def test_steps_stopped_and_resumed_are_the_steps_of_a_straight_run(lab: Any, options: list[str]) -> None:
    straight = lab.train(*options).directory
    with lab.during(3, stop):
        stopped = lab.train(*options)
    assert (stopped.state, stopped.step) == ("stopped", 3)
    resumed = lab.resume(stopped.directory)
    assert (resumed.state, resumed.step) == ("done", 6)
    assert lab.tensors(resumed.directory) == lab.tensors(straight)
    assert lab.metrics(resumed.directory) == lab.metrics(straight)
    assert resumed.evaluation == lab.info(straight)["evaluation"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks at its own inputs
def test_compiled_layers_resume_exactly(lab: Any) -> None:
    import torch

    from sky_core.model.decoder import DecoderLM

    def compile_layers(model: DecoderLM) -> None:
        for layer in model.layers:
            layer.compile(backend="aot_eager")  # the default backend would start a C++ compiler

    lab.monkeypatch.setattr(DecoderLM, "compile_layers", compile_layers)
    torch._dynamo.reset()
    options = ["train.compile=true", "train.steps=4"]
    straight = lab.train(*options).directory
    with lab.during(2, stop):
        stopped = lab.train(*options)
    assert lab.tensors(lab.resume(stopped.directory).directory) == lab.tensors(straight)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(every=st.sampled_from([None, 1, 2, 3, 4]), deaths=st.lists(st.integers(1, 5), min_size=1, max_size=2))
def test_a_run_that_dies_anywhere_ends_where_a_straight_one_does(
    lab: Any, killing: Any, every: int | None, deaths: list[int]
) -> None:
    shutil.rmtree("runs", ignore_errors=True)
    lab.write(eval={"every": 4}, checkpoint={"every": every}, train={"micro_batch": 2})
    straight = lab.train().directory
    killing(deaths[0], lab.train)
    (run,) = set(Path("runs").iterdir()) - {straight}
    for step in deaths[1:]:
        if step > (max(lab.steps(run), default=0)):
            killing(step, lab.resume, run)
    lab.resume(run)
    assert lab.tensors(run) == lab.tensors(straight)
    assert lab.metrics(run) == lab.metrics(straight)
    assert lab.steps(run) == lab.steps(straight)


def test_a_process_killed_again_and_again_ends_with_the_bits_of_a_straight_run(
    lab: Any, started: Callable[..., Any], wait_for: Callable[..., Any]
) -> None:
    lab.write(train={"steps": 60}, checkpoint={"every": 4}, eval={"every": 10})
    straight = lab.train().directory
    chance = random.Random(2)
    command: list[Any] = ["train", "run.yaml"]
    for _ in range(3):
        process = started(*command)
        run = wait_for(lambda: next(iter(set(Path("runs").iterdir()) - {straight}), None))
        before = max(lab.steps(run), default=0)
        wait_for(lambda: max(lab.steps(run), default=0) > before or not process.is_alive())  # noqa: B023
        process.join(chance.random() / 10)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert lab.sky("sample", run, "--max-new-tokens", "1").code == 0, "the last checkpoint cannot be read"
        command = ["resume", run]
    lab.resume(run)
    assert lab.tensors(run) == lab.tensors(straight)
    assert lab.metrics(run) == lab.metrics(straight)


def test_a_killed_run_is_crashed_and_a_live_one_in_use(
    lab: Any, started: Callable[..., Any], wait_for: Callable[..., Any]
) -> None:
    lab.write(train={"steps": 100_000}, checkpoint={"every": 100}, eval={"every": None}, log={"every": 1000})
    process = started("train", "run.yaml")
    run = wait_for(lambda: next(iter(Path("runs").glob("*/run.json")), None)).parent
    wait_for(lambda: lab.info(run)["state"] == "running")
    assert "running" in lab.sky("runs").out
    told = lab.sky("resume", run)
    assert told.code == 2
    assert told.errors == [
        f"sky: {run}: in use by process {process.pid} on {os.uname().nodename}; wait for it, or stop it with SIGTERM"
        " (it saves and exits)"
    ]
    process.kill()
    process.join()
    assert "crashed" in lab.sky("runs").out
    assert lab.resume(run, f"train.steps={max(lab.steps(run), default=0) + 1}").state == "done"


def test_a_run_that_died_before_its_first_checkpoint_starts_again(lab: Any, killing: Any) -> None:
    straight = lab.train().directory
    killing(1, lab.train)
    (run,) = set(Path("runs").iterdir()) - {straight}
    assert lab.steps(run) == []
    lab.resume(run)
    assert lab.tensors(run) == lab.tensors(straight)
    assert lab.metrics(run) == lab.metrics(straight)


def test_a_complete_run_says_how_to_make_it_longer_and_then_goes_on(lab: Any) -> None:
    run = lab.train("schedule=constant").directory
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}
    told = lab.sky("resume", run)
    assert told.code == 2
    assert told.errors == [
        f"sky: {run}/checkpoints/step_000006: the run is complete (6 of 6 steps); `sky resume {run} train.steps=...`"
        " makes it longer"
    ]
    assert {path: path.read_bytes() for path in before} == before
    assert lab.sky("resume", run, "train.steps=8").code == 0
    assert lab.tensors(run) == lab.tensors(lab.train("schedule=constant", "train.steps=8").directory)


def test_taking_up_an_earlier_step_forgets_what_came_after(lab: Any) -> None:
    lab.write(checkpoint={"keep_last": 3}, eval={"every": 2})
    run = lab.train("schedule=constant").directory
    assert lab.steps(run) == [2, 4, 6]
    with lab.during(3, stop):
        lab.resume(f"{run}@2", "optimizer.lr=0.03")
    assert lab.steps(run) == [2, 3]
    assert os.readlink(run / "checkpoints" / "last") == "step_000003"
    assert os.readlink(run / "checkpoints" / "best") == "step_000002"
    assert [line["step"] for line in lab.metrics(run)] == [1, 2, 2, 3]
    lab.resume(run)
    assert lab.steps(run) == [3, 4, 6]
    other = lab.train("schedule=constant").directory
    assert lab.tensors(run) != lab.tensors(other), "the override was lost"


def test_an_earlier_step_taken_up_unchanged_comes_to_the_same_end(lab: Any) -> None:
    run = lab.train().directory
    straight = lab.tensors(run)
    (run / "checkpoints" / "step_000006" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"MANIFEST.json: missing.*RUN@STEP"):
        lab.resume(run)
    lab.resume(f"{run}@4")
    assert lab.tensors(run) == straight


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_model=32", "does not fit the model: model.embed_tokens.weight has shape"),
        ("model.n_layer=2", "layers.1.* is missing"),
        ("tokenizer={kind: byte, end_of_text: false}", "it was trained with tokenizer"),
        ("data.sequence_length=8", "it was trained with data"),
        ("seed=3", "it was trained with data"),
        ("optimizer={kind: muon}", "it was trained with optimizer adamw, this run has muon"),
        ("train.ema=0.9", "holds no averaged weights"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_refused_and_changes_nothing(lab: Any, override: str, message: str) -> None:
    with lab.during(3, stop):
        run = lab.train().directory
    kept = ("log.txt", ".lock")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in kept}
    with pytest.raises(UserError, match=message) as error:
        lab.resume(run, override)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in kept} == before


def test_other_versions_of_plugins_are_told_when_resuming(lab: Any, caplog: pytest.LogCaptureFixture) -> None:
    from sky_core.plugins import Plugins

    with lab.during(3, stop):
        run = lab.train().directory
    lab.monkeypatch.setattr(Plugins, "versions", lambda self: {"sky-core": "9.9"})
    with caplog.at_level("WARNING"):
        lab.resume(run)
    assert "resuming under other versions" in caplog.text


def test_a_callback_finds_its_own_state_when_others_were_added(lab: Any) -> None:
    Path("counters.py").write_text(
        """
from typing import ClassVar
from sky_core import hookimpl, slots

class Counter:
    def __init__(self, trainer): self.count = 0
    def on_step(self, step, metrics): self.count += 1
    def on_end(self, result): open("counts", "a").write(f"{type(self).__name__} {self.count}\\n")
    def state_dict(self): return {"count": self.count}
    def load_state_dict(self, state): self.count = state["count"]

class Other(Counter): pass

class A(slots.Callback):
    "Counts."
    kind: ClassVar = "a"
    def build(self, trainer): return Counter(trainer)

class B(slots.Callback):
    "Counts."
    kind: ClassVar = "b"
    def build(self, trainer): return Other(trainer)

@hookimpl
def sky_callbacks(): return [A, B]
"""
    )
    lab.write(plugins=["./counters.py"])
    with lab.during(4, stop):
        run = lab.train("callbacks=[a]").directory
    lab.resume(run, "callbacks=[b, a]")
    assert Path("counts").read_text().split("\n")[:-1] == ["Counter 4", "Other 2", "Counter 6"]
