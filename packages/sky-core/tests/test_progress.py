"""Progress: plain lines where there is no terminal, a live display where there is one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sky_core.training.progress import (
    LiveProgress,
    PlainProgress,
    Progress,
    describe,
    duration,
    make_progress,
    memory,
    quantity,
)

METRICS = {
    "loss": 4.8123,
    "lr": 9.1e-4,
    "grad_norm": 0.714,
    "tokens": 512.0,
    "tokens_per_second": 1740.0,
    "mfu": 0.412,
    "peak_rss": 3.1 * 2**30,
    "eta_seconds": 5 * 3600 + 42 * 60,
    "z_loss": 0.01,
    "skipped": 0,
}


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def terminal(**options: object) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=140, legacy_windows=False, **options)  # type: ignore[arg-type]


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pipe_gets_one_line_per_log_without_control_codes() -> None:
    console = pipe()
    with make_progress(12000, console=console) as progress:
        progress.update(1240, METRICS)
        progress.evaluation(1250, {"loss": 4.79, "bits_per_byte": 1.439})
        progress.evaluation(1260, {"loss": 4.7, "bits_per_byte": 1.421}, best=True)
        progress.sample(1260, "The capital\nof \x1b[31mFrance [bold]is")
        progress.sample(1260, "of France", prompt="The capital ")
    assert text(console).splitlines() == [
        "step   1 240/12 000  10.3%  loss 4.8123  z_loss 0.01  lr 9.1e-04  gnorm 0.71  1.74k tok/s  mfu 41%  rss 3.1G"
        "  eta 5h42",
        "eval  1 250  loss 4.7900  bpb 1.439",
        "eval  1 260  loss 4.7000 (-0.090)  bpb 1.421 (-0.018)  ★ best",
        r"sample  1 260  'The capital\nof \x1b[31mFrance [bold]is'",
        "sample  1 260  'The capital ' 'of France'",
    ]


def test_a_terminal_gets_a_bar_with_the_last_values_and_evaluations_above() -> None:
    console = terminal()
    with make_progress(12000, console=console) as progress:
        assert isinstance(progress, LiveProgress)
        progress.update(1240, METRICS)
        progress.evaluation(1250, {"loss": 4.79}, best=True)
        progress.update(12000, METRICS | {"loss": 3.25})
    shown = text(console)
    assert "eval  1 250  loss 4.7900  ★ best" in shown
    last = shown[shown.rindex("step") :]
    assert all(part in last for part in ("12 000/12 000", "100.0%", "loss 3.2500", "━"))
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is given back


def test_the_terminal_is_given_back_after_an_error() -> None:
    console = terminal()

    def interrupted() -> None:
        with make_progress(10, console=console) as progress:
            progress.update(3, METRICS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert text(console).endswith("\x1b[?25h")


def test_no_color_and_dumb_terminals_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = terminal()
    with make_progress(10, console=console) as progress:
        progress.update(3, METRICS)
    assert not any(f"\x1b[{code}m" in text(console) for code in (31, 32, 33, 34, 35, 36))
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_progress(10, console=terminal())) is PlainProgress


def test_quiet_shows_nothing_and_the_default_writes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with make_progress(10, quiet=True) as progress:
        assert type(progress) is Progress
        progress.update(1, METRICS)
        progress.evaluation(1, METRICS)
        progress.sample(1, "text")
        progress.message("hello")
    make_progress(10).message("one line")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "one line\n"


def test_a_loss_that_is_not_finite_and_skipped_steps_are_shown() -> None:
    console = pipe()
    PlainProgress(10, console).update(3, {"loss": float("nan"), "skipped": 2})
    assert text(console) == "step   3/10  30.0%  loss nan  skipped 2\n"


@pytest.mark.parametrize(
    ("seconds", "written"), [(0, "0s"), (59.6, "1m00"), (725, "12m05"), (20520, "5h42"), (273600, "3d04h")]
)
def test_durations(seconds: float, written: str) -> None:
    assert duration(seconds) == written


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (640.0, "640"),
        (1740, "1.74k"),
        (17400, "17.4k"),
        (174000, "174k"),
        (12.1e6, "12.1M"),
        (2.1e33, "2.1e+33"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_quantities(number: float, written: str) -> None:
    assert quantity(number) == written


def test_words_that_tell_nothing_are_left_out() -> None:
    assert describe({"loss": 4.0, "bytes": 1.4e6, "tokens": 4e5, "mfu": 0.0312}) == ["loss 4.0000", "mfu 3.1%"]


@pytest.mark.parametrize(
    ("size", "written"), [(640, "640 bytes"), (6656, "6.5K"), (850 * 2**20, "850M"), (3.1 * 2**30, "3.1G")]
)
def test_bytes(size: float, written: str) -> None:
    assert memory(size) == written
