"""nanoGPT's Shakespeare recipe for the CPU, once per seed: how good does the decoder get, and how fast?

Trains recipes/nanogpt_cpu.yaml as it is, from Python, and records per seed

    curve           loss of the whole validation split at each evaluation, in nats per token and bits per byte
    windows         that loss once more, computed the way nanoGPT's own weights were measured: the last tenth of the
                    text in windows of 64 characters side by side, cross-entropy of the logits, our data code not used
    random batches  nanoGPT's estimate: 20 batches of 12 windows at random (its draws depend on what ran before them,
                    so the windows are others than in its log)
    sky eval        what the command says of the finished run directory: the same number
    cost            wall and CPU seconds of everything after the text is tokenized (training, evaluation, samples,
                    checkpoints); tokens/s over that time, and while training alone

nanoGPT's numbers beside ours were measured with its own code on a machine of two such cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import sky_core
from sky_core.bench.record import Record, add_corpus, arguments, run_script
from sky_core.config import read_run
from sky_core.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]

NANOGPT = {
    "name": "nanoGPT",
    "commit": "3adf61e154c3fe3fca428ad6bc3818b27a3b8291",
    "how": "its train.py and model.py, seed 1337, one run on two cores of this kind (torch 2.13, fp32)",
    "windows": 1.8982,
    "random_batches": 1.8857,
    "curve_of": "loss of 20 random batches",
    "curve": [
        [0, 4.1649], [250, 2.4447], [500, 2.3141], [750, 2.1905], [1000, 2.0528],
        [1250, 2.0089], [1500, 1.9225], [1750, 1.8921], [2000, 1.8857],
    ],
}  # fmt: skip


def train(recipe: Path, overrides: list[str]) -> dict[str, Any]:
    """Train the recipe; its run directory, curve and cost."""
    run = read_run(recipe, overrides)
    run.data.build(run.seed, run.tokenizer)  # tokenized now, before the clock starts
    wall, cpu = time.perf_counter(), time.process_time()
    result = sky_core.train(recipe, overrides)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    directory = RunDirectory.open(result.directory)
    steady = [line["tokens_per_second"] for line in directory.metrics() if "tokens_per_second" in line]
    evaluations = [event for event in directory.events() if event["event"] == "eval"]
    if any(event["loss"] is None for event in evaluations):
        raise SystemExit(f"seed {run.seed}: the loss was not finite; there is nothing to measure")
    return {
        "directory": directory,
        "curve": [{key: event[key] for key in ("step", "loss", "bits_per_byte")} for event in evaluations],
        "seconds": wall,
        "cpu_seconds": cpu,
        "tokens": directory.info["tokens"],
        "tokens_per_second": directory.info["tokens"] / wall,
        "tokens_per_second_training": statistics.median(steady),
    }


@torch.no_grad()
def nanogpt_losses(directory: Path, text: str, length: int, batch: int, n_batches: int) -> dict[str, float]:
    """The final weights under nanoGPT's two measures, in nats per character; `length` characters a window."""
    model, tokenizer = sky_core.load(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    held_out_N = torch.tensor(tokenizer.encode(text[int(len(text) * 0.9) :]))

    def loss(starts_B: torch.Tensor) -> torch.Tensor:
        windows_BL = torch.stack([held_out_N[i : i + length + 1] for i in starts_B.tolist()]).to(device)
        return F.cross_entropy(model(windows_BL[:, :-1]).flatten(0, 1), windows_BL[:, 1:].flatten()).double().cpu()

    starts_W = torch.arange(0, len(held_out_N) - length, length)
    total = sum(loss(starts_B) * len(starts_B) for starts_B in starts_W.split(128))
    drawn = torch.Generator().manual_seed(1337)
    estimates = [
        loss(torch.randint(len(held_out_N) - length, (batch,), generator=drawn)).item() for _ in range(n_batches)
    ]
    return {"windows": float(total) / len(starts_W), "random_batches": statistics.mean(estimates)}


def sky_eval(directory: Path) -> float:
    command = [sys.executable, "-m", "sky_core", "eval", str(directory), "--json"]
    return json.loads(subprocess.check_output(command, text=True, stderr=subprocess.PIPE))["loss"]


def run_seeds(
    options: argparse.Namespace, what: str, overrides: list[str], *, n_batches: int
) -> tuple[Record, list[dict[str, Any]]]:
    """Every seed trained and measured; an empty record."""
    recipe = ROOT / "recipes" / f"{options.name}.yaml"
    seeds = [1337 + i for i in range(1 if options.smoke else options.seeds)]
    record = Record(options, what=what, seeds=seeds)
    text = options.data.read_text(encoding="utf-8")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"data.path={options.data.resolve()}", f"data.cache={folder}/cache", f"out={folder}/runs", *overrides]
        for seed in seeds:
            run = {"seed": seed, **train(recipe, [*fixed, f"seed={seed}"])}
            directory: RunDirectory = run.pop("directory")
            config = directory.config
            length = config.data.sequence_length
            batch = config.train.batch_tokens // length
            run |= nanogpt_losses(directory.path, text, length, batch, n_batches)
            run["sky_eval"] = sky_eval(directory.path)
            runs.append(run)
            print(
                f"seed {seed}: {run['windows']:.4f} in windows, {run['curve'][-1]['loss']:.4f} at the last evaluation"
            )
    return record, runs


def measure_the_rest(record: Record, runs: list[dict[str, Any]], *, rounding: float) -> None:
    """What both recipes of nanoGPT have in common.

    `rounding`: nats per token by which `sky eval` (fp32, on the CPU) may be off the evaluation while training.
    """
    final = [run["curve"][-1] for run in runs]
    last = [point["loss"] for point in final]
    again = [abs(run["sky_eval"] - loss) for run, loss in zip(runs, last, strict=True)]
    record.measure("`sky eval` off the last evaluation", again, "nats/token", at_most=rounding)
    record.measure("bits per byte, whole validation split", [point["bits_per_byte"] for point in final], "bits/byte")
    record.measure("speed while training", [run["tokens_per_second_training"] for run in runs], "tokens/s")
    record.measure("time for everything, wall", [run["seconds"] for run in runs], "s")
    record.measure("time for everything, CPU", [run["cpu_seconds"] for run in runs], "s")


def main() -> None:
    parser = arguments("nanogpt_cpu", __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs, seeded 1337, 1338, ... (default: 3)")
    add_corpus(parser)
    options = parser.parse_args()
    small = ["train.steps=3", "schedule.warmup=1", "eval.every=1", "checkpoint.every=2", "log.every=1"]
    what = "recipes/nanogpt_cpu.yaml on tinyshakespeare: 0.80M parameters, 2,000 steps"
    record, runs = run_seeds(options, what, small if options.smoke else [], n_batches=2 if options.smoke else 20)
    record.measure(
        "loss, whole validation split",
        [run["curve"][-1]["loss"] for run in runs],
        "nats/token",
        at_most=1.90,
        peer=("nanoGPT", NANOGPT["windows"]),
    )
    for key, how in (("windows", "windows of 64 characters side by side"), ("random_batches", "20 random batches")):
        values = [run[key] for run in runs]
        record.measure(f"loss, nanoGPT's way, {how}", values, "nats/token", peer=("nanoGPT", NANOGPT[key]))
    measure_the_rest(record, runs, rounding=1e-6)
    record.save(runs=runs, peers=[NANOGPT])


if __name__ == "__main__":
    run_script(main)
