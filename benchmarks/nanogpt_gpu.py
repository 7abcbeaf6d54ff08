"""nanoGPT's Shakespeare recipe for one GPU (10.65M parameters, 5,000 steps), once per seed; see nanogpt_cpu.py.

The published number, 1.4697, is the lowest of nanoGPT's evaluations, each over 200 random batches: beside it stands the
lowest loss of the whole split that an evaluation found. Runs without a GPU as well, in about a working day.
"""

from __future__ import annotations

from nanogpt_cpu import measure_the_rest, run_seeds

from sky_core.bench.record import add_corpus, arguments, run_script

NANOGPT = {"name": "nanoGPT", "how": "its README, one A100, best of 200 random batches", "best": 1.4697, "curve": []}


def main() -> None:
    parser = arguments("nanogpt_gpu", __doc__)
    parser.add_argument("--seeds", type=int, default=1, help="runs, seeded 1337, 1338, ... (default: 1)")
    add_corpus(parser)
    options = parser.parse_args()
    small = ["train.steps=3", "train.batch_tokens=512", "train.compile=false", "schedule.warmup=1", "eval.every=2"]
    small += ["model.n_layer=1", "model.d_model=48"]
    what = "recipes/nanogpt_gpu.yaml on tinyshakespeare: 10.65M parameters, 5,000 steps"
    record, runs = run_seeds(options, what, small if options.smoke else [], n_batches=2 if options.smoke else 200)
    record.measure(
        "lowest loss of an evaluation, whole validation split",
        [min(point["loss"] for point in run["curve"]) for run in runs],
        "nats/token",
        peer=("nanoGPT, published", NANOGPT["best"]),
    )
    record.measure("loss at the end, whole validation split", [run["curve"][-1]["loss"] for run in runs], "nats/token")
    # bf16 has 8 bits of precision: a loss computed in it is known to about a hundredth.
    measure_the_rest(record, runs, rounding=0.01)
    record.save(runs=runs, peers=[NANOGPT])


if __name__ == "__main__":
    run_script(main)
