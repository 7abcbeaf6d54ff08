"""What a run measures while it trains: metric lines, throughput, memory.

`metrics.jsonl` holds one JSON object a line, {"step", "time", metric: value, ...}: appended, flushed, never rewritten
except when a run goes on from an earlier step.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from sky_core.errors import SkyError, UserError


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
    """Appends metric lines to `path`.

    With `resume_from`, the lines of later steps and a last line cut off by a crash are dropped first; the file is
    replaced in one move, so a crash here loses nothing.
    """

    def __init__(self, path: str | Path, *, resume_from: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_from is not None and self.path.exists():
            rewind(self.path, resume_from)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line. A value that is not finite becomes null, which every JSON reader takes."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file as dictionaries; a last line that is still being written is left out.

    Raises `SkyError` naming the line that is no JSON.
    """
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                raise SkyError(f"{path}:{number}: damaged line; delete it to read the rest") from None


def rewind(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file whose "step" is after `step`, atomically."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
    """Tokens per second, seconds per step and time to go, over the time between two readings.

    `count` costs nothing and waits for no device; call `read` after something that does (fetching the loss).
    `smoothing` is the weight of the past in the averages, per reading.
    """

    def __init__(self, total_steps: int, step: int = 0, *, smoothing: float = 0.8) -> None:
        self.total_steps = total_steps
        self.smoothing = smoothing
        self._step = step
        self._tokens = 0.0
        self._since = time.perf_counter()
        self._seconds_per_step: float | None = None
        self._tokens_per_second = 0.0

    def count(self, tokens: float) -> None:
        """Tokens were trained on."""
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (evaluation, saving) is nobody's training time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - started

    def read(self, step: int) -> dict[str, float]:
        """`tokens_per_second`, `seconds_per_step` (both smoothed) and `eta_seconds` after `step` steps.

        Empty when no step was made since the last reading.
        """
        steps, now = step - self._step, time.perf_counter()
        if steps <= 0:
            return {}
        seconds = max(now - self._since, 1e-9)
        past = 0.0 if self._seconds_per_step is None else self.smoothing
        self._seconds_per_step = past * (self._seconds_per_step or 0.0) + (1 - past) * seconds / steps
        self._tokens_per_second = past * self._tokens_per_second + (1 - past) * self._tokens / seconds
        self._step, self._tokens, self._since = step, 0.0, now
        return {
            "tokens_per_second": self._tokens_per_second,
            "seconds_per_step": self._seconds_per_step,
            "eta_seconds": (self.total_steps - step) * self._seconds_per_step,
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
