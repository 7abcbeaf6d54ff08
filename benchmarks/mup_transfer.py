"""Does the best learning rate stay put when the model gets wider? (muP, Yang et al. 2022, arXiv:2203.03466, figure 1)

Trains a small decoder on tinyshakespeare at widths 64, 128 and 256 over learning rates a factor of two apart, in the
standard parametrisation and under muP with base width 64 (at width 64 the two are one). Per width the losses of the
whole validation split, averaged over seeds; the best rate is the vertex of the parabola through the lowest point and
its neighbours, in octaves (log2).

The picture is written beside the result.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import sky_core
from sky_core.bench.record import Record, add_corpus, arguments, run_script

WIDTHS = (64, 128, 256)
OCTAVES = tuple(range(-10, -3))
HEAD_DIM = 16


def loss_of(width: int, octave: int, mup: bool, seed: int, folder: str, text: Path, steps: int) -> float:
    """Validation loss after training that model at the rate 2^octave, in nats per character."""
    parametrisation = {"mup": {"base_d_model": WIDTHS[0]}} if mup else {}
    run = {
        "name": "mup",
        "seed": seed,
        "out": f"{folder}/runs",
        "model": {
            "n_layer": 2,
            "n_head": width // HEAD_DIM,
            "d_model": width,
            "max_length": 64,
            "tie_embeddings": False,
            **parametrisation,
        },
        "tokenizer": {"kind": "char", "byte_fallback": False, "end_of_text": False},
        "data": {
            "kind": "text", "path": str(text), "cache": f"{folder}/cache", "sequence_length": 64, "split": "position",
        },
        "optimizer": {"kind": "adamw", "lr": 2.0**octave, "weight_decay": 0.0},
        "schedule": {"kind": "linear", "warmup": 0.1},
        "train": {"steps": steps, "batch_tokens": 1024, "precision": "fp32", "dry_run": False},
        "eval": {"every": steps},
        "checkpoint": {"every": steps, "keep_best": False},
    }  # fmt: skip
    return sky_core.train(run).evaluation["loss"]


def best_octave(losses: list[float]) -> float:
    """Where the loss is lowest: the vertex of the parabola through the lowest point and its neighbours."""
    i = min(range(len(losses)), key=losses.__getitem__)
    if i in (0, len(losses) - 1):
        return float(OCTAVES[i])
    left, middle, right = losses[i - 1 : i + 2]
    return OCTAVES[i] + 0.5 * (left - right) / (left - 2 * middle + right)


def draw(sweeps: list[dict[str, Any]], path: Path) -> None:
    """Loss over learning rate, a line per width, standard parametrisation beside muP."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = path.stem
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, mup, title in zip(axes, (False, True), ("standard parametrisation", "muP, base width 64"), strict=True):
        for color, sweep in enumerate(one for one in sweeps if one["mup"] == mup):
            axis.plot(sweep["octaves"], sweep["losses"], "o-", markersize=3, color=f"C{color}", label=sweep["width"])
            axis.axvline(sweep["best_octave"], color=f"C{color}", linestyle=":")
        axis.set(xlabel="log2 of the learning rate", title=title)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="validation loss (nats per character)")
    axes[1].legend(title="width")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = arguments("mup_transfer", __doc__)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each point (default: 2)")
    parser.add_argument("--steps", type=int, default=200)
    add_corpus(parser)
    options = parser.parse_args()
    seeds = list(range(1 if options.smoke else options.seeds))
    steps = 2 if options.smoke else options.steps
    record = Record(options, what="best learning rate over the width, with and without muP", seeds=seeds)
    sweeps = []
    with tempfile.TemporaryDirectory() as folder:
        for width in WIDTHS[:1] if options.smoke else WIDTHS:
            for mup in (False, True):
                if mup and width == WIDTHS[0] and not options.smoke:  # the same run
                    sweeps.append({**sweeps[-1], "mup": True})
                    continue
                losses = [
                    statistics.mean(
                        loss_of(width, octave, mup, seed, folder, options.data.resolve(), steps) for seed in seeds
                    )
                    for octave in OCTAVES
                ]
                sweep = {"width": width, "mup": mup, "octaves": OCTAVES, "losses": losses}
                sweeps.append({**sweep, "best_octave": best_octave(losses), "best_loss": min(losses)})
                print(f"width {width}, {'muP' if mup else 'standard'}: best at 2^{sweeps[-1]['best_octave']:.2f}")
    for mup, name in ((True, "muP"), (False, "standard parametrisation")):
        best = [sweep["best_octave"] for sweep in sweeps if sweep["mup"] == mup]
        target = {"at_most": 0.5} if mup else {}
        record.measure(
            f"shift of the best learning rate, width 64 to 256, {name}", abs(best[-1] - best[0]), "octaves", **target
        )
    for mup, name in ((True, "muP"), (False, "standard parametrisation")):
        record.measure(
            f"loss at width {WIDTHS[-1]}, best rate of width 64, {name}", _at_base_rate(sweeps, mup), "nats/token"
        )
    if record.path is not None:
        record.path.parent.mkdir(parents=True, exist_ok=True)
        draw(sweeps, record.path.with_suffix(".svg"))
    runs = [
        {"width": sweep["width"], "mup": sweep["mup"], "octave": octave, "loss": loss}
        for sweep in sweeps
        for octave, loss in zip(sweep["octaves"], sweep["losses"], strict=True)
    ]
    record.save(runs=runs, sweeps=sweeps)


def _at_base_rate(sweeps: list[dict[str, Any]], mup: bool) -> float:
    """Loss of the widest model at the grid rate that was best for the narrowest."""
    own = [sweep for sweep in sweeps if sweep["mup"] == mup]
    base = own[0]["losses"]
    return own[-1]["losses"][base.index(min(base))]


if __name__ == "__main__":
    run_script(main)
