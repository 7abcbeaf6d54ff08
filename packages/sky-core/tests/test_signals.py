"""SIGTERM and SIGINT end a run between two steps with everything saved; a second SIGINT ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from sky_core.training import checkpoint
from sky_core.training.signals import SIGNALS, StopSignals


def send(number: signal.Signals, times: int = 1) -> Any:
    def act(*_: Any) -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return act


@pytest.fixture
def straight(lab: Any) -> dict[str, bytes]:
    return lab.tensors(lab.train("name=straight").directory)  # type: ignore[no-any-return]


def the_run() -> Path:
    (run,) = Path("runs").glob("*_tiny-*")
    return run


def test_the_first_signal_asks_the_second_interrupts_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    asked: list[str] = []
    with StopSignals(asked.append) as signals:
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()
        send(signal.SIGINT)()
        assert signals.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)()
    assert asked == ["SIGTERM received", "SIGTERM received", "SIGINT received"]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_handler_that_python_did_not_set_is_left_as_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    real = signal.signal
    set_to: list[Any] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_to.append(handler))
    with StopSignals(lambda reason: None):
        pass
    assert set_to[2:] == [signal.SIG_DFL] * 2
    monkeypatch.setattr(signal, "signal", real)


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with StopSignals(lambda reason: None):
                pass
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_saved_and_it_goes_on_exactly(
    lab: Any, straight: dict[str, bytes], number: signal.Signals, code: int
) -> None:
    with lab.during(3, send(number)):
        told = lab.sky("train", "run.yaml")
    run = the_run()
    assert (told.code, told.errors) == (code, [])
    assert told.out.splitlines()[0].startswith(f"stopped at step 3 ({number.name} received)")
    assert f"resume   sky resume {run}" in told.out
    assert (lab.info(run)["state"], lab.info(run)["step"]) == ("stopped", 3)
    assert lab.steps(run) == [2, 3]
    assert lab.sky("resume", run).code == 0
    assert lab.tensors(run) == straight


@pytest.mark.parametrize("when", ["save_file", "write_json", "sync_folder", "sha256"])
def test_a_signal_in_the_middle_of_a_save_lets_it_finish(lab: Any, straight: dict[str, bytes], when: str) -> None:
    function = getattr(checkpoint, when)
    sent: list[bool] = []

    def interrupted(*arguments: Any) -> Any:
        if not sent:
            sent.append(True)
            send(signal.SIGINT)()
        return function(*arguments)

    with lab.monkeypatch.context() as patch:
        patch.setattr(checkpoint, when, interrupted)
        told = lab.sky("train", "run.yaml")
    run = the_run()
    assert told.code == 130
    assert lab.steps(run) == [2]
    checkpoint.verify_checkpoint(run / "checkpoints" / "last")
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert lab.sky("resume", run).code == 0
    assert lab.tensors(run) == straight


@pytest.mark.parametrize("when", ["save_file", "write_json", "sync_folder", "link_checkpoint", "prune_checkpoints"])
def test_a_second_sigint_in_a_save_ends_at_once_and_harms_nothing(
    lab: Any, straight: dict[str, bytes], when: str
) -> None:
    function = getattr(checkpoint, when)

    def impatient(trainer: Any) -> None:
        def interrupted(*arguments: Any) -> Any:
            send(signal.SIGINT, times=2)()
            return function(*arguments)

        patch.setattr(checkpoint, when, interrupted)

    with lab.monkeypatch.context() as patch, lab.during(4, impatient):
        told = lab.sky("train", "run.yaml")
    run = the_run()
    assert (told.code, told.errors) == (130, [])
    assert "Traceback" not in told.err
    assert lab.info(run)["state"] == "failed"
    for path in (run / "checkpoints").glob("step_*"):
        checkpoint.verify_checkpoint(path)
    checkpoint.verify_checkpoint(run / "checkpoints" / "last")
    assert lab.sky("resume", run).code == 0
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert lab.tensors(run) == straight


def test_a_signal_before_the_first_step_leaves_a_checkpoint_of_the_start(lab: Any, straight: dict[str, bytes]) -> None:
    from sky_core.training.trainer import Trainer

    with lab.monkeypatch.context() as patch:
        patch.setattr(Trainer, "_dry_run", send(signal.SIGTERM))
        assert lab.sky("train", "run.yaml").code == 0
    run = the_run()
    assert lab.steps(run) == [0]
    assert lab.sky("resume", run).code == 0
    assert lab.tensors(run) == straight


def test_ctrl_c_while_the_run_is_being_built_is_130_and_leaves_no_run(lab: Any) -> None:
    from sky_core.components.data import Text

    def slow(*_: Any) -> Any:
        raise KeyboardInterrupt

    lab.monkeypatch.setattr(Text, "build", slow)
    told = lab.sky("train", "run.yaml")
    assert (told.code, told.errors) == (130, [])
    assert list(Path("runs").iterdir()) == []
