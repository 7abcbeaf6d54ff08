"""What each change brought on the way from nanoGPT's CPU recipe to recipes/shakespeare.yaml, and what brought nothing.

Two lists, every entry trained once per seed on tinyshakespeare with 1.536M characters and, unless its name says so,
about 0.80M parameters:

    LADDER   from nanoGPT's recipe to ours, one change after the other
    OTHERS   recipes/shakespeare.yaml, where the ladder ends, with one thing changed

An entry's effect is the difference of its mean loss to the entry above it (LADDER) or to the ladder's end (OTHERS).
`--jobs` runs share the machine, one thread each; their cost is told in CPU seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sky_core.bench.record import Record, add_corpus, arguments, run_script
from sky_core.files import write_json

ROOT = Path(__file__).resolve().parents[1]

Entry = tuple[str, list[str]]
SWIGLU = 'model.feedforward={"kind": "swiglu", "d_ff": 344}'
MUON = 'optimizer={"kind": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 3e-3, "betas": [0.9, 0.99]}}'

LADDER: list[Entry] = [
    ("nanoGPT's recipe", []),
    ("RoPE and SwiGLU", ["model.position=rope", SWIGLU]),
    ("AdamW at 3e-3, not 1e-3", ["optimizer.lr=3e-3"]),
    ("norms of queries and keys", ["model.qk_norm=head"]),
    ("Muon, not AdamW", [MUON]),
    ("WSD falling for half of the steps, not a cosine", ['schedule={"kind": "wsd", "warmup": 100, "decay": 0.5}']),
    ("a context of 192 characters, not 64", ["model.max_length=192", "data.sequence_length=192"]),
    (
        "1,000 steps of 1,536 characters at 0.03, not 2,000 of 768 at 0.02",
        ["train.batch_tokens=1536", "train.steps=1000", "optimizer.lr=0.03"],
    ),
    ("bf16, not fp32", ["train.precision=bf16"]),
    ("attention by an operator of our own", ["train.compile=operators"]),
]
"""(what changed, overrides of recipes/nanogpt_cpu.yaml); each keeps those before it."""

OTHERS: list[Entry] = [
    ("no norms of queries and keys", ["model.qk_norm=null"]),
    ("RMSNorm, not LayerNorm", ['model.norm={"kind": "rmsnorm"}']),
    ("squared ReLU (d_ff 516)", ['model.feedforward={"kind": "relu2", "d_ff": 516}']),
    ("value embeddings", ["model.attention.value_embedding=true"]),
    ("residual scalars", ["model.block.residual_scalars=true"]),
    ("residual projections start at zero", ["model.zero_residual=true"]),
    ("ALiBi", ["model.position=alibi"]),
    ("3 wider layers", ["model.n_layer=3", "model.d_model=144", "model.feedforward.d_ff=414"]),
    ("one further token (1.03M parameters in training)", ["model.n_mtp=1", "objective=multi_token"]),
    (
        "8 experts, 2 chosen (the same active parameters, 2.4M in all)",
        ['model.feedforward={"kind": "moe", "n_experts": 8, "top_k": 2, "d_ff": 172, "aux_loss": 0.01}'],
    ),
    ("embeddings and norms at 6e-3, not 3e-3", ["optimizer.adamw.lr=6e-3"]),
    ("4 iterations of Muon's polynomial, not 5", ["optimizer.steps=4"]),
    ("a context of 256 characters", ["model.max_length=256", "data.sequence_length=256"]),
]
"""(what is different, overrides of recipes/shakespeare.yaml)."""


def train(recipe: str, overrides: list[str], seed: int, folder: Path, data: Path) -> dict[str, Any]:
    """Loss of the whole validation split, CPU seconds and characters of one run, in a process of its own.

    A run of just this kind that `folder` already holds is not trained again.
    """
    key = hashlib.sha256(json.dumps([recipe, overrides, seed]).encode()).hexdigest()[:12]
    out, result = folder / key, folder / f"{key}.json"
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    shutil.rmtree(out, ignore_errors=True)
    fixed = [f"seed={seed}", f"out={out}", f"data.path={data}", f"data.cache={folder}/cache", "sample.every=null"]
    command = [sys.executable, "-m", "sky_core", "train", str(ROOT / "recipes" / f"{recipe}.yaml"), *fixed, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"failed with {process.returncode}: {shlex.join(command)}")
    cpu_seconds = used.ru_utime + used.ru_stime
    (directory,) = out.iterdir()
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    info = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    evaluation = [event for event in events if event["event"] == "eval"][-1]
    run = {"seed": seed, "loss": evaluation["loss"], "cpu_seconds": cpu_seconds, "characters": info["tokens"]}
    write_json(result, run)
    return run


def entries() -> list[dict[str, Any]]:
    """Both lists, resolved."""
    found: list[dict[str, Any]] = []
    overrides: list[str] = []
    for name, changes in LADDER:
        overrides = [*overrides, *changes]
        found.append({"list": "ladder", "name": name, "recipe": "nanogpt_cpu", "overrides": overrides})
    found += [{"list": "others", "name": name, "recipe": "shakespeare", "overrides": own} for name, own in OTHERS]
    return found


def main() -> None:
    parser = arguments("shakespeare_ablation", __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each entry, seeded 1337, 1338, ... (default: 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--only", nargs="*", help="entries whose name holds one of these words")
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs: what is interrupted goes on from there")
    add_corpus(parser)
    options = parser.parse_args()
    seeds = [1337 + i for i in range(1 if options.smoke else options.seeds)]
    record = Record(options, what="what each change of the Shakespeare recipe brought", seeds=seeds)
    small = ["train.steps=3", "schedule.warmup=1", "eval.every=3"] if options.smoke else []
    chosen = [one for one in entries() if not options.only or any(word in one["name"] for word in options.only)]
    if options.smoke:
        chosen = chosen[:1] + chosen[-1:]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        folder, data = (options.runs or Path(name)).resolve(), options.data.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # Seed by seed, so that what the machine does in the meantime meets every entry alike.
        tasks = [
            (one, pool.submit(train, one["recipe"], [*one["overrides"], *small], seed, folder, data))
            for seed in seeds
            for one in chosen
        ]
        for one, task in tasks:
            run = task.result()
            one.setdefault("runs", []).append(run)
            print(f"{one['name']}, seed {run['seed']}: {run['loss']:.4f}", flush=True)
    for one in chosen:
        losses = [run["loss"] for run in one["runs"]]
        one["mean"] = statistics.mean(losses)
        one["cpu_seconds"] = statistics.median(run["cpu_seconds"] for run in one["runs"])
    means = {one["name"]: one["mean"] for one in chosen}
    ladder = [name for name, _ in LADDER]
    for one in chosen:
        place = ladder.index(one["name"]) if one["list"] == "ladder" else len(ladder)
        if place > 0 and ladder[place - 1] in means:
            one["effect"] = one["mean"] - means[ladder[place - 1]]
        record.measure(f"{one['list']}: {one['name']}", [run["loss"] for run in one["runs"]], "nats/token")
    record.save(runs=chosen)


if __name__ == "__main__":
    run_script(main)
