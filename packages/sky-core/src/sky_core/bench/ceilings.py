"""What the machine itself can do, measured beside the contenders: fast code is judged by these, not by a data sheet.

    matrix product    FLOP/s of the fastest of some products (`training/flops.py`): what training is bound by
    memory, copy      bytes read and written per second of a tensor far larger than the caches
    memory, read      bytes read per second (a sum): what decoding at batch 1 is bound by, which reads every weight

A ceiling is the highest rate seen: whatever else runs can only lower one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sky_core.training.flops import Shape, best_rate, product_flops, shapes_for, synchronizer

TINY: list[Shape] = [(64, 64, 64)]
"""Of a smoke run."""
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
            for shape in TINY if self.small else shapes_for(self.device, precision):
                rate = product_flops(shape, precision, self.device, self.seconds)
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


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
