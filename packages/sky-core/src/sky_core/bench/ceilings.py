"""What the machine itself can do, measured beside the contenders: fast code is judged by these, not by a data sheet.

    matrix product    FLOP/s of the fastest of some (M, K) x (K, N) products, 2 M K N each: what training is bound by
    memory, copy      bytes read and written per second of a tensor far larger than the caches
    memory, read      bytes read per second (a sum): what decoding at batch 1 is bound by, which reads every weight

A ceiling is the highest rate seen: whatever else runs can only lower one. The products are those of a training step of
a small model (rows of tokens against a projection, a feed-forward part, a head) and a square one.

M rows, K inner width, N columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sky_core.training.precision import bf16_hardware

Shape = tuple[int, int, int]

SHAPES: dict[str, list[Shape]] = {
    "cpu": [(2048, 512, 512), (2048, 512, 1408), (2048, 512, 16384), (2048, 2048, 2048)],
    "cuda": [(8192, 1024, 1024), (8192, 4096, 4096), (16384, 8192, 8192)],
}
SMALL: list[Shape] = [(64, 64, 64)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEMORY_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass
class Ceilings:
    """The highest rates seen so far; `update` measures once more."""

    device: str
    precisions: tuple[str, ...]
    seconds: float = 0.2
    small: bool = False
    flops: dict[str, float] = field(default_factory=dict)
    best_shape: dict[str, Shape] = field(default_factory=dict)
    copy_bytes: float = 0.0
    read_bytes: float = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the memory moves at most, whichever way."""
        return max(self.copy_bytes, self.read_bytes)

    def update(self) -> Ceilings:
        """Measure everything for `seconds` each; rates only rise. Returns itself."""
        kind = torch.device(self.device).type
        for precision in self.precisions:
            emulated = precision == "bf16" and not bf16_hardware(kind)
            shapes = SMALL if self.small or emulated else SHAPES["cuda" if kind == "cuda" else "cpu"]
            for shape in shapes:
                rate = product(shape, precision, self.device, self.seconds)
                if rate > self.flops.get(precision, 0.0):
                    self.flops[precision], self.best_shape[precision] = rate, shape
        size = 2**20 if self.small else MEMORY_BYTES["cuda" if kind == "cuda" else "cpu"]
        source = torch.zeros(size // 4, device=self.device)
        target = torch.empty_like(source)
        wait = synchronizer(self.device)
        self.copy_bytes = max(self.copy_bytes, 2 * size * best_rate(lambda: target.copy_(source), wait, self.seconds))
        self.read_bytes = max(self.read_bytes, size * best_rate(source.sum, wait, self.seconds))
        return self

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("seconds", "small")} | {
            "bandwidth": self.bandwidth
        }


def product(shape: Shape, precision: str, device: str, seconds: float) -> float:
    """FLOP/s of the product of `shape` (M, K, N) in "fp32" or "bf16"."""
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a_MK = torch.randn(m, k, generator=generator).to(device, DTYPES[precision])
    b_NK = torch.randn(n, k, generator=generator).to(device, DTYPES[precision])
    with torch.no_grad():
        rate = best_rate(lambda: torch.nn.functional.linear(a_MK, b_NK), synchronizer(device), seconds)
    return 2.0 * m * k * n * rate


def best_rate(work: Callable[[], object], synchronize: Callable[[], None], seconds: float) -> float:
    """Times per second that `work` is done, by the fastest of repeated goes within `seconds` (one at least).

    A go repeats the work until it is long against the clock and the start of a kernel.
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


def synchronizer(device: str) -> Callable[[], None]:
    """What waits for the device: nothing on a CPU, which is never ahead."""
    if torch.device(device).type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
