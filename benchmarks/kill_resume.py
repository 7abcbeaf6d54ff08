"""kill -9 at random moments of a run, `sky resume` each time: is the end what it would have been?

One run is left alone. The same run is then killed with SIGKILL `--kills` times and resumed each time with the command,
as a person would; if it ends before that many kills, another one is begun. After each kill

    every checkpoint that calls itself complete (it has a manifest) is compared with its manifest,
    the links `last` and `best` lead to complete checkpoints, and
    run.json, config.yaml, metrics.jsonl and events.jsonl can be read;

at the end the weights, their average and the optimizer's state are compared bit for bit with the run left alone, and so
is every loss, training and validation, in metrics.jsonl.

The moment of a kill is uniform over [0, start-up + window] seconds of a life, so start-up (imports, data, loading the
checkpoint), steps, evaluations and saves are hit in proportion to the time they take. Start-up is measured on the run
left alone; the window is such that about `--progress` of a run is done when the kills are over. A life that is not to
be killed any more runs to the end, so the benchmark ends whatever the machine does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sky_core.bench.record import Record, add_corpus, arguments, run_script
from sky_core.errors import SkyError
from sky_core.run_directory import RunDirectory, list_runs
from sky_core.training.checkpoint import load_tensors, verify_checkpoint
from sky_core.yaml_file import dump_yaml

PHASES = ("start-up", "step", "evaluation", "save")
LOSSES = ("loss", "grad_norm", "validation_loss")


def run_file(text: Path, steps: int, save_every: int, folder: Path) -> dict[str, Any]:
    """A small model with everything that has state: dropout, an average of the weights, a schedule, a best loss."""
    return {
        "name": "killed",
        "model": {"n_layer": 2, "n_head": 2, "d_model": 64, "dropout": 0.1},
        "tokenizer": {"kind": "byte"},
        "data": {
            "kind": "text", "path": str(text), "sequence_length": 64, "split": "position",
            "cache": str(folder / "cache"),
        },
        "train": {"steps": steps, "batch_tokens": 512, "micro_batch": 4, "precision": "fp32", "ema": 0.99},
        "eval": {"every": save_every * 3 // 2},
        "checkpoint": {"every": save_every, "keep_last": 3},
        "log": {"every": 1},
    }  # fmt: skip


@dataclass
class Runner:
    """Runs `sky` as processes whose output goes to one log."""

    folder: Path
    file: Path

    def live(self, directory: RunDirectory | None, out: Path, seconds: float | None = None) -> tuple[int, bool]:
        """One life: begin the run in `out`, or resume it, and kill it after `seconds`; (pid, whether it was killed).

        Raises SystemExit when it ends by itself in any way but done.
        """
        words = ["train", str(self.file), f"out={out}"] if directory is None else ["resume", str(directory.path)]
        with (self.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", "sky_core", *words], stdout=log, stderr=log)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
            code = process.wait()
        if code not in (0, -signal.SIGKILL):
            tail = "\n".join((self.folder / "log.txt").read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"sky {' '.join(words)} ended with exit code {code}:\n{tail}")
        return process.pid, code != 0


def found(out: Path) -> RunDirectory | None:
    """The run in `out`; a life that was killed before it wrote run.json left none, and the next one begins anew."""
    runs = list_runs(out)
    return runs[-1] if runs else None


def last_step(directory: RunDirectory | None) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    complete = directory.checkpoints if directory else []
    return int(complete[-1].name.removeprefix("step_")) if complete else 0


def phase(directory: RunDirectory | None, pid: int) -> str:
    """What the killed process was doing, from what it left behind."""
    if directory is None or directory.info.get("pid") != pid:
        return "start-up"
    steps = [line["step"] for line in directory.metrics() if "loss" in line]
    done = {kind: {e["step"] for e in directory.events() if e["event"] == kind} for kind in ("eval", "checkpoint")}
    if list((directory.path / "checkpoints").glob(".tmp-*")) or last_step(directory) > max(
        done["checkpoint"], default=0
    ):
        return "save"
    if steps and steps[-1] % directory.config.eval.every == 0 and steps[-1] not in done["eval"]:
        return "evaluation"
    return "step"


def faults(directory: RunDirectory | None) -> tuple[int, list[str]]:
    """Complete checkpoints looked at, and everything that cannot be read."""
    if directory is None:
        return 0, []
    wrong = []
    complete = directory.checkpoints
    for checkpoint in complete:
        try:
            verify_checkpoint(checkpoint)
        except SkyError as error:
            wrong.append(str(error))
    for name in ("last", "best"):
        link = directory.path / "checkpoints" / name
        if link.is_symlink() and link.resolve() not in [path.resolve() for path in complete]:
            wrong.append(f"{name} points to {os.readlink(link)}, which is no complete checkpoint")
    for what in ("info", "state", "config"):
        try:
            getattr(directory, what)
        except (SkyError, OSError, ValueError) as error:
            wrong.append(f"{what}: {error}")
    for name in ("metrics", "events"):
        try:
            getattr(directory, name)()
        except (SkyError, OSError, ValueError) as error:
            wrong.append(f"{name}: {error}")
    return len(complete), wrong


def losses(directory: RunDirectory) -> list[tuple[Any, ...]]:
    return [(line["step"], *(line.get(name) for name in LOSSES)) for line in directory.metrics()]


def compared(directory: RunDirectory, reference: RunDirectory) -> dict[str, Any]:
    """What differs between two finished runs: tensors by file (bit for bit), and metric lines."""
    ours, theirs = (run.path / "checkpoints" / "last" for run in (directory, reference))
    differing = {}
    for stem in ("model", "training/ema", "training/optimizer"):
        a, b = load_tensors(ours, stem), load_tensors(theirs, stem)
        if not b:
            raise SystemExit(f"{theirs}: it holds no {stem}; there is nothing to compare")
        same = [name for name in a.keys() & b.keys() if _same_bits(a[name], b[name])]
        differing[stem] = sorted((a.keys() | b.keys()) - set(same))
    lines, expected = losses(directory), losses(reference)
    leftovers = [path.name for path in (directory.path / "checkpoints").glob(".tmp-*")]
    return {
        "differing_tensors": differing,
        "metric_lines": len(expected),
        "differing_metric_lines": len(set(lines) ^ set(expected)) + abs(len(lines) - len(expected)),
        "leftovers": leftovers,
    }


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def timing(directory: RunDirectory, began: float) -> tuple[float, float]:
    """(start-up, training) of a run left alone, in seconds; `began` is when its process was started."""
    times = [line["time"] for line in directory.metrics()]
    return times[0] - began, times[-1] - times[0]


def window(startup: float, training: float, kills: int, progress: float) -> float:
    """Seconds D after the start-up S such that kills uniform over [0, S + D] leave `progress` of the run done.

    A life lasts D - t beyond its start-up with probability density 1 / (S + D), so it trains D² / (2 (S + D)) seconds
    on average: D² - c D - c S = 0 with c = 2 progress training / kills. Never longer than a whole run.
    """
    c = 2 * progress * training / kills
    return min((c + (c * c + 4 * c * startup) ** 0.5) / 2, training)


def main() -> None:
    parser = arguments("kill_resume", __doc__)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs in all (default: 50)")
    parser.add_argument("--steps", type=int, default=2000, help="steps of a run (default: 2000)")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints (default: 10)")
    parser.add_argument("--progress", type=float, default=0.8, help="of a run, done after the kills (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    add_corpus(parser)
    options = parser.parse_args()
    if options.smoke:
        options.kills, options.steps, options.save_every = 1, 60, 6
    record = Record(options, what=f"{options.kills} SIGKILLs at random moments of a run", seeds=[options.seed])
    clock, moments = time.perf_counter(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "corpus.txt"
        text.write_text(options.data.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
        file = folder / "run.yaml"
        file.write_text(dump_yaml(run_file(text, options.steps, options.save_every, folder)), encoding="utf-8")
        runner = Runner(folder, file)

        began = time.time()
        runner.live(None, folder / "alone")
        alone = found(folder / "alone")
        assert alone is not None, "a run that ended has a directory"
        startup, training = timing(alone, began)
        longest = startup + window(startup, training, options.kills, options.progress)
        print(f"left alone: {startup:.1f} s to start, {training:.1f} s of training; kills within {longest:.1f} s")

        kills: list[dict[str, Any]] = []
        runs: list[dict[str, Any]] = []
        while len(kills) < options.kills:
            out, directory, lives = folder / f"killed-{len(runs)}", None, 0
            while last_step(directory) < options.steps:
                moment = moments.uniform(0, longest) if len(kills) < options.kills else None
                pid, killed = runner.live(directory, out, moment)
                directory, lives = found(out), lives + 1
                if killed:
                    checked, wrong = faults(directory)
                    kill = {"after_s": moment, "phase": phase(directory, pid), "saved_step": last_step(directory)}
                    kills.append(kill | {"checkpoints_verified": checked, "faults": wrong})
                    print(f"kill {len(kills)}/{options.kills}: {json.dumps(kills[-1])}", flush=True)
            assert directory is not None, "a run that ended has a directory"
            checked, wrong = faults(directory)
            runs.append({"lives": lives, "faults": wrong, **compared(directory, alone)})

    hit = Counter(kill["phase"] for kill in kills)
    record.measure("kills", len(kills), "")
    for name in PHASES:
        record.measure(f"kills that hit: {name}", hit[name], "")
    record.measure("complete checkpoints verified", sum(kill["checkpoints_verified"] for kill in kills), "")
    record.measure("unreadable checkpoints and files", sum(len(x["faults"]) for x in [*kills, *runs]), "", at_most=0)
    for stem, what in (("model", "weights"), ("training/ema", "averages"), ("training/optimizer", "optimizer states")):
        count = sum(len(run["differing_tensors"][stem]) for run in runs)
        record.measure(f"{what} that differ from the run left alone (tensors)", count, "", at_most=0)
    record.measure(
        "lines of metrics.jsonl that differ", sum(run["differing_metric_lines"] for run in runs), "", at_most=0
    )
    record.measure("left behind by interrupted saves", sum(len(run["leftovers"]) for run in runs), "", at_most=0)
    record.save(
        seconds=time.perf_counter() - clock, startup_s=startup, training_s=training, longest_life_s=longest,
        steps=options.steps, checkpoint_every=options.save_every, runs=runs, kills=kills,
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
