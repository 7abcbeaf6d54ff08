"""Metric lines that survive crashes, TensorBoard, throughput and memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sky_core import files
from sky_core.errors import SkyError, UserError
from sky_core.files import append_json_line, read_json_lines
from sky_core.training import metrics
from sky_core.training.metrics import MetricsLog, TensorBoardLog, Throughput, host_scalars, peak_memory, rewind


def write(path: Path, steps: range) -> None:
    writer = MetricsLog(path)
    for step in steps:
        writer.log(step, {"loss": 1.0 / step})
    writer.close()


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    writer = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    writer.log(3, {"loss": 2.5, "skipped": 0})
    (line,) = read_json_lines(tmp_path / "deep" / "metrics.jsonl")
    assert (line["step"], line["loss"], line["skipped"]) == (3, 2.5, 0)
    assert line["time"] > 0
    writer.close()


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    writer = MetricsLog(tmp_path / "m.jsonl")
    writer.log(1, {"loss": float("nan"), "grad_norm": float("inf")})
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["grad_norm"] is None


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 8))
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    rewind(path, 5)
    writer = MetricsLog(path)
    writer.log(6, {"loss": 9.0})
    writer.close()
    assert [line["step"] for line in read_json_lines(path)] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in read_json_lines(path)][4:] == [0.2, 9.0]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_crash_while_rewinding_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 8))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        rewind(path, 5)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n\0\0\0\n{"step": 3}\n')
    with pytest.raises(SkyError, match=r"m\.jsonl:2: damaged line"):
        list(read_json_lines(path))


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.floats(-1e6, 1e6, width=32), max_size=5))
def test_tensors_and_numbers_come_to_the_host_in_their_order(values: dict[str, float]) -> None:
    mixed = {name: torch.tensor(v) if i % 2 else v for i, (name, v) in enumerate(values.items())}
    assert list(host_scalars(mixed).items()) == list(values.items())


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_from, steps in ((None, range(1, 6)), (3, range(4, 6))):
        writer = TensorBoardLog(tmp_path, resume_from=resume_from)
        for step in steps:
            writer.log(step, {"loss": step / 4})
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(step, step / 4) for step in range(1, 6)]


def test_tensorboard_that_is_missing_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"not installed; pip install 'sky-core\[tensorboard\]'"):
        TensorBoardLog(tmp_path)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)


def test_throughput_counts_training_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = Throughput(total_steps=100)
    for _ in range(10):
        meter.count(50, waited=0.1)
        clock.now += 0.5
    with meter.paused():
        clock.now += 60
    clock.now += 30
    meter.exclude(30)
    read = meter.read(10)
    assert read.pop("wait") == pytest.approx(0.2)
    assert read == {"tokens_per_second": 100.0, "seconds_per_step": 0.5, "eta_seconds": 45.0}
    assert meter.read(10) == {}


def test_throughput_is_smoothed_over_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = Throughput(total_steps=100, step=40, smoothing=0.5)
    for step, seconds in ((41, 1.0), (42, 3.0)):
        meter.count(30)
        clock.now += seconds
        read = meter.read(step)
    assert read["seconds_per_step"] == pytest.approx(2.0)
    assert read["tokens_per_second"] == pytest.approx(20.0)
    assert read["eta_seconds"] == pytest.approx(58 * 2.0)


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not tell")
def test_peak_memory_is_in_bytes() -> None:
    assert 2**24 < peak_memory()["peak_rss"] < 2**42


def test_a_line_cut_off_by_a_crash_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_json_line(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    append_json_line(path, {"step": 3})
    append_json_line(path, {"step": 4})
    assert [line["step"] for line in read_json_lines(path)] == [1, 3, 4]
