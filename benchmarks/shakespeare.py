"""recipes/shakespeare.yaml beside recipes/nanogpt_cpu.yaml: the same parameters, characters and time, a better loss?

Trains both recipes in turn, once per seed, in one process, and records for each the loss of the whole validation split
(in windows of the recipe's own context, and in nanoGPT's windows of 64 characters), wall and CPU seconds of everything
after the text is tokenized, parameters and characters seen. Both evaluate and sample once, at their end, whatever their
recipes say; operators are compiled before the clock starts. Ratios are of runs of one seed, which ran one after the
other.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nanogpt_cpu import nanogpt_losses, train

import sky_core
from sky_core import native
from sky_core.bench.record import Record, add_corpus, arguments, run_script
from sky_core.config import read_run

ROOT = Path(__file__).resolve().parents[1]

RECIPES = ("nanogpt_cpu", "shakespeare")
WINDOW = 64


def main() -> None:
    parser = arguments("shakespeare", __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe, seeded 1337, 1338, ... (default: 3)")
    add_corpus(parser)
    options = parser.parse_args()
    seeds = [1337 + i for i in range(1 if options.smoke else options.seeds)]
    small = ["train.steps=3", "schedule.warmup=1"] if options.smoke else []
    record = Record(options, what="recipes/shakespeare.yaml beside recipes/nanogpt_cpu.yaml, in turn", seeds=seeds)
    text = options.data.read_text(encoding="utf-8")
    native.load()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"data.path={options.data.resolve()}", f"data.cache={folder}/cache", f"out={folder}/runs", *small]
        for seed in seeds:
            for recipe in RECIPES:
                path = ROOT / "recipes" / f"{recipe}.yaml"
                steps = read_run(path, fixed).train.steps
                run = train(path, [*fixed, f"seed={seed}", f"eval.every={steps}", f"sample.every={steps}"])
                directory = run.pop("directory")
                model, _ = sky_core.load(directory.path)
                run |= {"recipe": recipe, "seed": seed, "parameters": model.n_parameters()["total"]}
                run |= nanogpt_losses(directory.path, text, WINDOW, 12, 1)
                runs.append(run)
                print(f"{recipe}, seed {seed}: {run['curve'][-1]['loss']:.4f} in {run['seconds']:.0f} s")
    nanogpt, ours = ([run for run in runs if run["recipe"] == recipe] for recipe in RECIPES)

    def ratios(key: str) -> list[float]:
        return [mine[key] / theirs[key] for mine, theirs in zip(ours, nanogpt, strict=True)]

    theirs = sorted(run["curve"][-1]["loss"] for run in nanogpt)[len(nanogpt) // 2]
    record.measure(
        "loss, whole validation split",
        [run["curve"][-1]["loss"] for run in ours],
        "nats/token",
        at_most=1.55,
        peer=("recipes/nanogpt_cpu.yaml", theirs),
    )
    record.measure("loss in windows of 64 characters", [run["windows"] for run in ours], "nats/token")
    record.measure("wall time, relative to nanoGPT's recipe", ratios("seconds"), "x", at_most=1.0)
    record.measure("CPU time, relative to nanoGPT's recipe", ratios("cpu_seconds"), "x")
    record.measure("parameters, relative to nanoGPT's recipe", ratios("parameters"), "x", at_most=1.05)
    record.measure("characters seen", [run["tokens"] for run in ours], "characters", at_most=1_536_000)
    record.save(runs=[{**run, "seed": f"{run['seed']}, {run['recipe']}"} for run in runs])


if __name__ == "__main__":
    run_script(main)
