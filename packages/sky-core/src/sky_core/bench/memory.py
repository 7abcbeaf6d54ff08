"""Peak memory of training steps, each contender in a process of its own.

    base     what the process holds once the libraries are imported and before a model exists (resident set)
    peak     the most it holds while it trains: of the steps after the first, where the system can forget the peak
             before (Linux), because compiling and loading need memory that training does not; else of the whole life
    on CUDA  what torch has allocated at most during these steps (`max_memory_allocated`), without a base

The peak without the base is what the model costs; the peak is what the machine must have. Losses of the contenders
must agree as in `train.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sky_core.bench.contenders import CONTENDERS, contender, distributions, peers_of
from sky_core.bench.defaults import BATCH, record_name
from sky_core.bench.record import Record, spread
from sky_core.bench.report import Settings, bars, finish
from sky_core.bench.shape import Shape, find_shape
from sky_core.config import parse_preset
from sky_core.errors import CheckFailed, SkyError

TARGET_RATIO = 0.75
"""Of the issue on speed: peak memory against the peer that needs least."""


@dataclass(frozen=True)
class Task:
    """What one process does: `steps` training steps of one contender after a first one."""

    contender: str
    shape: dict[str, Any]
    length: int
    batch: int
    precision: str
    compile: bool
    steps: int


@dataclass(frozen=True)
class Found:
    """What it found: bytes, seconds of each step, the loss before training (fp32), training FLOPs of a token."""

    base: int
    peak: int
    peak_of: str
    loss: float
    parameters: int
    flops_per_token: float
    device: str
    seconds: list[float] = field(default_factory=list)


def run(
    settings: Settings,
    *,
    shape: str | None,
    length: int,
    batch: int,
    against: str,
    precision: str,
    compile: bool,
    steps: int,
    repeats: int,
) -> None:
    """Measure and record. Raises `CheckFailed` when the contenders do not compute the same."""
    from sky_core.bench.ceilings import default_device

    if settings.smoke:
        length, batch, steps, repeats = 16, 2, 1, 1
    peers = peers_of(against)
    names = ["ours", *peers]
    found = find_shape(shape, smoke=settings.smoke).at_length(length)
    how = f"{precision}, {'compiled' if compile else 'uncompiled'}"
    name = record_name(
        "memory", found.name, f"T{length}", precision, "" if compile else "eager",
        device=default_device(), B=(batch, BATCH),
    )  # fmt: skip
    record = Record(
        settings.options(name),
        what=f"memory of training {found.name}, {batch} x {length} tokens a step, {how}",
        seeds=[0],
        peers=distributions(names),
    )
    results: dict[str, list[Found]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            results[name].append(measure(Task(name, as_table(found), length, batch, precision, compile, steps)))
    _agree({name: runs[0].loss for name, runs in results.items()})

    peaks = {name: [run.peak / 2**20 for run in runs] for name, runs in results.items()}
    own = {name: [(run.peak - run.base) / 2**20 for run in runs] for name, runs in results.items()}
    least = min(peers, key=lambda name: min(peaks[name])) if peers else None
    for name in names:
        record.measure(f"{name}: peak", peaks[name], "MiB")
        record.measure(f"{name}: of that for the model", own[name], "MiB")
        record.measure(f"{name}: base of imports", [run.base / 2**20 for run in results[name]], "MiB")
    if least is not None:
        record.measure(
            "ours against the peer that needs least",
            [ours / theirs for ours, theirs in zip(peaks["ours"], peaks[least], strict=True)],
            "times its peak",
            at_most=None if settings.smoke else TARGET_RATIO,
            peer=(least, min(peaks[least])),
            better="lower",
        )
        record.measure(
            f"ours against {least}, without the imports",
            [ours / theirs for ours, theirs in zip(own["ours"], own[least], strict=True)],
            "times its memory",
            better="lower",
        )
    count = results["ours"][0].parameters
    record.measure("on paper: weights, gradients and AdamW's state in fp32", 16 * count / 2**20, "MiB")
    finish(
        record,
        settings,
        bars(f"peak memory of training {found.name} ({how})", "MiB", {n: spread(v) for n, v in peaks.items()}),
        sizes={"shape": found.name, "model": found.model.as_dict(), "vocabulary": found.vocab_size, "length": length,
               "batch": batch, "steps": steps},
        runs=[{"contender": name, **asdict(run)} for name, runs in results.items() for run in runs],
    )  # fmt: skip


def as_table(shape: Shape) -> dict[str, Any]:
    """A shape as another process reads it."""
    return {"name": shape.name, "model": {**shape.model.as_dict(), "vocab_size": shape.vocab_size}}


def measure(task: Task) -> Found:
    """The task in a process of its own. Raises `SkyError` with the last line it said when it fails."""
    command = [sys.executable, "-m", "sky_core.bench.memory", json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SkyError(f"{task.contender}: its process failed: {said}")
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def _agree(losses: dict[str, float]) -> None:
    from sky_core.bench.train import WEIGHTS, disagreement

    if difference := disagreement(losses, WEIGHTS):
        raise CheckFailed(difference)


# ------------------------------------------------------------------------------------------ in the other process


def perform(task: Task) -> Found:
    """The task, in this process."""
    import torch
    import torch._dynamo

    from sky_core.bench.ceilings import default_device
    from sky_core.bench.train import random_batch
    from sky_core.training.flops import synchronizer

    preset: Any = parse_preset(task.shape)
    shape = Shape(preset.name, preset.model, preset.vocab_size)
    kind = contender(task.contender)
    device = default_device()
    wait = synchronizer(device)
    base = 0 if device == "cuda" else resident("VmRSS")

    model = shape.build()
    flops = model.flops_per_token(task.length)
    one = kind(model, device)
    del model
    tokens_BT, targets_BT = random_batch(shape.vocab_size, task.batch, task.length, device)
    loss = one.loss(tokens_BT, targets_BT)
    one.prepare_training(task.precision, compile=task.compile)
    one.train_step(tokens_BT, targets_BT)
    wait()
    forgotten = forget_peak(device)
    seconds = []
    for _ in range(task.steps):
        started = time.perf_counter()
        one.train_step(tokens_BT, targets_BT)
        wait()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    peak_of = "the steps after the first" if forgotten else "the whole process"
    return Found(base, peak, peak_of, loss, one.parameters, flops, device, seconds)


def forget_peak(device: str) -> bool:
    """Let the peak begin anew from what is held now; whether the system could."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(key: str) -> int:
    """Bytes of `VmRSS` (held now) or `VmHWM` (the most so far). Where there is no /proc, the most so far for both.

    Not `ru_maxrss` on Linux: a process inherits that of the one which started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    assert task.contender in CONTENDERS
    try:
        found = perform(task)
    except SkyError as error:
        raise SystemExit(str(error)) from None
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main()
