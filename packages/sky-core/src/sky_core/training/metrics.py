"""What a run measures while it trains: metric lines, throughput, memory.

`metrics.jsonl` holds one JSON object a line, {"step", "time", metric: value, ...}: appended, flushed, never rewritten
except when a run goes on from an earlier step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from sky_core.errors import UserError
from sky_core.files import append_json_line, read_json_lines, write_atomic


class MetricsWriter(Protocol):
    """Where metrics go: JSON lines, TensorBoard, a plugin's own."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def host_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers and scalar tensors as floats and ints. The tensors of one device cross over together: one wait for it."""
    tensors = {name: value.detach() for name, value in metrics.items() if torch.is_tensor(value)}
    values: dict[str, float] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        names = [name for name, tensor in tensors.items() if tensor.device == device]
        stacked = torch.stack([tensors[name].float().reshape(()) for name in names])
        values.update(zip(names, stacked.tolist(), strict=True))
    return {name: values.get(name, value) for name, value in metrics.items()}


class MetricsLog:
    """Appends metric lines to `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line. A value that is not finite becomes null, which every JSON reader takes."""
        append_json_line(self.path, {"step": step, "time": round(time.time(), 3), **metrics})

    def close(self) -> None:
        """Nothing to close: every line is on its own."""


def rewind(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file whose "step" is after `step`, and a torn last one, in one step."""
    kept = [line for line in read_json_lines(path) if line.get("step", 0) <= step]
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


class TensorBoardLog:
    """The same numbers as TensorBoard events in `folder`. Raises `UserError` when TensorBoard is not installed."""

    def __init__(self, folder: str | Path, *, resume_from: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "log.tensorboard: TensorBoard is not installed; pip install 'sky-core[tensorboard]' or set it to false"
            ) from error
        purge = None if resume_from is None else resume_from + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Throughput:
    """Tokens per second, seconds per step, time to go and waiting for data, over the time between two readings.

    `count` costs nothing and waits for no device; call `read` after something that does (fetching the loss).
    `smoothing` is the weight of the past in the averages, per reading.
    """

    def __init__(self, total_steps: int, step: int = 0, *, smoothing: float = 0.8) -> None:
        self.total_steps = total_steps
        self.smoothing = smoothing
        self._step = step
        self._tokens = 0.0
        self._waited = 0.0
        self._since = time.perf_counter()
        self._seconds_per_step: float | None = None
        self._tokens_per_second = 0.0

    def count(self, tokens: float, waited: float = 0.0) -> None:
        """Tokens were trained on, after waiting for them for `waited` seconds."""
        self._tokens += tokens
        self._waited += waited

    def exclude(self, seconds: float) -> None:
        """So many seconds since the last reading are nobody's training time."""
        self._since += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (evaluation, saving) is nobody's training time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.exclude(time.perf_counter() - started)

    def read(self, step: int) -> dict[str, float]:
        """`tokens_per_second`, `seconds_per_step` (both smoothed), `eta_seconds` after `step` steps, and `wait`, the
        share of the time that was spent on waiting for data.

        Empty when no step was made since the last reading.
        """
        steps, now = step - self._step, time.perf_counter()
        if steps <= 0:
            return {}
        seconds = max(now - self._since, 1e-9)
        past = 0.0 if self._seconds_per_step is None else self.smoothing
        self._seconds_per_step = past * (self._seconds_per_step or 0.0) + (1 - past) * seconds / steps
        self._tokens_per_second = past * self._tokens_per_second + (1 - past) * self._tokens / seconds
        wait = self._waited / seconds
        self._step, self._tokens, self._waited, self._since = step, 0.0, 0.0, now
        return {
            "tokens_per_second": self._tokens_per_second,
            "seconds_per_step": self._seconds_per_step,
            "eta_seconds": (self.total_steps - step) * self._seconds_per_step,
            "wait": wait,
        }


def peak_memory(device: torch.device | str = "cpu") -> dict[str, int]:
    """The most memory this process has held, in bytes: `peak_rss` (where the system tells), and on CUDA `peak_gpu`."""
    peaks: dict[str, int] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.device(device).type == "cuda":
        peaks["peak_gpu"] = torch.cuda.max_memory_allocated(device)
    return peaks
