"""Draw the loss curves of a result file, a line per run, and write the picture beside it.

python benchmarks/plot.py                                     every result that holds curves
python benchmarks/plot.py benchmarks/results/nanogpt_cpu.json [--format png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from table import RESULTS

from sky_core.bench.report import figure


def draw(path: Path, form: str) -> Path | None:
    """The picture of one result file; none when its runs hold no curve."""
    data = json.loads(path.read_text(encoding="utf-8"))
    runs = [run for run in data["runs"] if isinstance(run, dict) and run.get("curve")]
    if not runs:
        return None
    target = path.with_suffix(f".{form}")
    with figure(target, (7, 4.2)) as axes:
        for run in runs:
            steps, losses = [p["step"] for p in run["curve"]], [p["loss"] for p in run["curve"]]
            axes.plot(steps, losses, marker="o", markersize=3, label=f"sky-core, seed {run['seed']}: {losses[-1]:.4f}")
        for peer in data.get("peers", []):
            if peer["curve"]:
                steps, losses = zip(*peer["curve"], strict=True)
                label = f"{peer['name']}, {peer['curve_of']}: {losses[-1]:.4f}"
                axes.plot(steps, losses, "k--", linewidth=1, label=label)
            elif "best" in peer:
                label = f"{peer['name']}: {peer['best']}"
                axes.axhline(peer["best"], color="k", linestyle="--", linewidth=1, label=label)
        axes.set(xlabel="step", ylabel="validation loss (nats per token)", title=data["what"])
        axes.grid(alpha=0.3)
        axes.legend()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="result files (default: all)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="of the picture (default: svg)")
    options = parser.parse_args()
    for path in options.results or sorted(RESULTS.glob("*.json")):
        target = draw(path, options.format)
        print(f"wrote {target}" if target else f"{path}: no curve")


if __name__ == "__main__":
    main()
