"""Precision: what `auto` means, and the measured peak."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch

from sky_core.bench import ceilings
from sky_core.errors import ConfigError
from sky_core.training import flops, precision
from sky_core.training.flops import measure_peak_flops, mfu
from sky_core.training.precision import resolve_precision


@pytest.mark.parametrize(("hardware", "chosen"), [("AVX512-BF16", "bf16"), ("AMX", "bf16"), (None, "fp32")])
def test_auto_is_bf16_exactly_where_the_hardware_multiplies_it(
    hardware: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "bf16_hardware", lambda *_: hardware)
    caplog.set_level(logging.INFO)
    assert resolve_precision("auto", "cpu") == chosen
    assert (hardware or "no bf16 arithmetic on this cpu") in caplog.text


def test_what_is_asked_for_is_taken_and_emulation_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "bf16_hardware", lambda *_: None)
    caplog.set_level(logging.INFO)
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
    assert "emulates" not in caplog.text
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert "only emulates bf16" in caplog.text


def test_this_cpu_is_recognised_as_torch_does() -> None:
    known = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert bool(precision.bf16_hardware("cpu")) == known


def test_another_word_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision: 'fp16' is none of auto, fp32, bf16"):
        resolve_precision("fp16", "cpu")


def test_the_peak_is_measured_quickly_and_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    started = time.perf_counter()
    peak = measure_peak_flops("cpu", "fp32", shapes=[(64, 128, 128), (64, 64, 64)], seconds=0.02)
    assert time.perf_counter() - started < 1.0
    assert 1e7 < peak < 1e15
    assert torch.equal(state, torch.get_rng_state())


def test_a_run_and_the_benchmarks_measure_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter(range(1, 100))
    seen: list[tuple[flops.Shape, str]] = []

    def planted(shape: flops.Shape, precision: str, *_: object) -> float:
        seen.append((shape, precision))
        return float(next(rates))

    for module in (flops, ceilings):
        monkeypatch.setattr(module, "product_flops", planted)
    monkeypatch.setattr(ceilings, "MEMORY_BYTES", {"cpu": 2**20})
    for kind in ("fp32", "bf16"):
        assert measure_peak_flops("cpu", kind) == len(seen)  # the last and fastest
        of_a_run, seen = seen, []
        ceilings.Ceilings("cpu", (kind,), seconds=0.0).update()
        assert seen == of_a_run
        rates, seen = iter(range(1, 100)), []


def test_the_peak_of_fp8_is_that_of_products_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, seen = torch._scaled_mm, []

    def watched(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(a.dtype)
        return multiply(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    assert measure_peak_flops("cpu", "fp8", shapes=[(32, 32, 32)], seconds=0.0) > 0
    assert set(seen) == {torch.float8_e4m3fn}


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_the_peak_is_that_of_what_a_run_multiplies_in(precision: str, lab: Any) -> None:
    asked: list[str] = []

    def peak(device: torch.device, precision: str) -> float:
        asked.append(precision)
        return 1e9

    lab.monkeypatch.setattr("sky_core.training.report.measure_peak_flops", peak)
    lab.monkeypatch.setattr("sky_core.training.fp8.require_fp8", lambda device: None)  # torch emulates it on a CPU
    lab.train(f"train.precision={precision}", "train.steps=2")
    assert asked == [precision]


def test_mfu_is_the_share_of_the_peak() -> None:
    assert mfu(tokens_per_second=1000, flops_per_token=6e6, peak_flops=12e9) == pytest.approx(0.5)
