"""The speed of matrix products on this device, measured: what model FLOP/s utilisation (MFU) is relative to.

    MFU = tokens/s · training FLOPs per token / peak FLOP/s        (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)

The peak is the highest rate seen of some products: the projections and the feed-forward part of a small model on the
tokens of a step, and a squarer one. A measured peak holds for the machine as it is (threads, clocks, what else runs),
where a data sheet may not. A run measures it once and briefly; `sky bench` the same products for longer
(`bench/ceilings.py`).

M rows (tokens), K inner width, N columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from sky_core.training.fp8 import FORWARD, quantize, scaled_product
from sky_core.training.precision import bf16_hardware

Shape = tuple[int, int, int]

SHAPES: dict[str, list[Shape]] = {
    "cpu": [(2048, 512, 512), (2048, 512, 1408), (2048, 1024, 1024)],
    "cuda": [(8192, 1024, 1024), (8192, 4096, 4096), (8192, 8192, 8192)],
}
"""(M, K, N) by device."""
SMALL: list[Shape] = [(256, 512, 512)]
"""Where there is no hardware for the type: a product of the others would take seconds."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""What factors are given in; those of fp8 are rounded from there, outside of the time that counts."""


def shapes_for(device: torch.device | str, precision: str) -> list[Shape]:
    """The products whose best is the peak of a device in "fp32", "bf16" or "fp8"."""
    device = torch.device(device)
    if precision != "fp32" and not bf16_hardware(device.type, device.index):
        return SMALL
    return SHAPES["cuda" if device.type == "cuda" else "cpu"]


def measure_peak_flops(
    device: torch.device | str,
    precision: str = "fp32",
    *,
    shapes: Sequence[Shape] | None = None,
    seconds: float = 0.2,
) -> float:
    """FLOP/s of the fastest of the products in "fp32", "bf16" or "fp8" (`shapes_for` the device unless given).

    Takes `seconds` in all and a warm-up of each; draws from no global random generator.
    """
    shapes = shapes or shapes_for(device, precision)
    return max(product_flops(shape, precision, device, seconds / len(shapes)) for shape in shapes)


def product_flops(shape: Shape, precision: str, device: torch.device | str, seconds: float) -> float:
    """FLOP/s of the (M, K) x (K, N) product of `shape`: 2 M K N each time."""
    m, k, n = shape
    generator = torch.Generator(device).manual_seed(0)
    a_MK = torch.randn(m, k, generator=generator, device=device).to(DTYPES[precision])
    b_NK = torch.randn(n, k, generator=generator, device=device).to(DTYPES[precision])
    work: Callable[[], torch.Tensor]
    if precision == "fp8":
        (a8_MK, a_scale), (b8_NK, b_scale) = quantize(a_MK, FORWARD), quantize(b_NK, FORWARD)
        work = partial(scaled_product, a8_MK, b8_NK, a_scale, b_scale, torch.bfloat16)
    else:
        work = partial(torch.nn.functional.linear, a_MK, b_NK)
    with torch.no_grad():
        return 2.0 * m * k * n * best_rate(work, synchronizer(device), seconds)


def best_rate(work: Callable[[], object], synchronize: Callable[[], None], seconds: float) -> float:
    """Times per second that `work` is done, by the fastest of repeated goes within `seconds` (one at least).

    The fastest, not the typical: whatever else runs can only slow it down. A go repeats the work until it is long
    against the clock and the start of a kernel.
    """
    work()
    synchronize()
    repeats, best, end = 1, 0.0, time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize()
        took = time.perf_counter() - started
        best = max(best, repeats / took)
        if took < 2e-3:
            repeats *= 2
        if time.perf_counter() >= end:
            return best


def synchronizer(device: torch.device | str) -> Callable[[], None]:
    """What waits for the device: nothing on a CPU, which is never ahead."""
    if torch.device(device).type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOP/s utilisation, a fraction of `peak_flops`."""
    return tokens_per_second * flops_per_token / peak_flops
