"""The matmul speed of this device, measured: what model FLOP/s utilisation (MFU) is relative to.

    MFU = tokens/s · training FLOPs per token / peak FLOP/s        (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)

A measured peak holds for the machine as it is (threads, clocks, what else runs), where a data sheet may not.

M rows (tokens), K inner width, N columns.
"""

from __future__ import annotations

import time

import torch

from sky_core.training.precision import bf16_hardware

Shape = tuple[int, int, int]


def measure_peak_flops(
    device: torch.device | str, precision: str = "fp32", *, shape: Shape | None = None, seconds: float = 0.2
) -> float:
    """FLOP/s of the fastest of repeated (M, K) x (K, N) products in "fp32" or "bf16".

    The fastest, not the typical: other work on the machine can only slow a product down. Takes `seconds` and one
    warm-up; draws from no global random generator. `shape` (M, K, N) defaults to one that saturates such a device.
    """
    device = torch.device(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    on_gpu = device.type == "cuda"
    # Without hardware for the type a product takes seconds: measure on less.
    small = (256, 512, 512) if dtype is torch.bfloat16 and not bf16_hardware(device.type, device.index) else (1024,) * 3
    m, k, n = shape or ((8192, 4096, 4096) if on_gpu else small)
    generator = torch.Generator().manual_seed(0)
    a_MK = torch.randn(m, k, generator=generator).to(device, dtype)
    b_NK = torch.randn(n, k, generator=generator).to(device, dtype)

    def once() -> float:
        started = time.perf_counter()
        torch.nn.functional.linear(a_MK, b_NK)
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    with torch.no_grad():
        once()
        best, end = once(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            best = min(best, once())
    return 2.0 * m * k * n / best


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOP/s utilisation, a fraction of `peak_flops`."""
    return tokens_per_second * flops_per_token / peak_flops
