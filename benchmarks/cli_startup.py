"""What it costs to ask the `sky` command something that needs no model.

CPU seconds (user and system, of the process and its children, as the kernel counts them) and wall seconds of each
command, all commands in turn, `--rounds` times, after one round that warms the page cache and writes .pyc files.
`python -c pass` is what no Python program can go below. Then each command once more under `-X importtime`: which
modules called torch were imported (target: none), and which packages cost most.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from sky_core.bench.record import Record, arguments, run_script

RUN = """\
model: {n_layer: 2, n_head: 2, d_model: 32}
data: {kind: text, path: corpus.txt, sequence_length: 32}
train: {steps: 10, batch_tokens: 320}
"""

COMMANDS = {
    "sky --help": ["--help"],
    "sky plugins": ["plugins"],
    "sky check": ["check", "run.yaml"],
    "sky show --no-build": ["show", "run.yaml", "--no-build"],
}
BARE = "python -c pass"


def cost(command: list[str], folder: Path) -> dict[str, float]:
    """CPU and wall seconds of one process. Raises SystemExit when it fails."""
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.perf_counter() - started}


def imports(arguments: list[str], folder: Path) -> tuple[list[str], Counter[str]]:
    """The imported modules of torch, and milliseconds by top-level package, each module's own time."""
    command = [sys.executable, "-X", "importtime", "-m", "sky_core", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    costs: Counter[str] = Counter()
    torch = []
    for line in done.stderr.splitlines():
        if line.startswith("import time:") and "[us]" not in line:
            own, _, name = line.removeprefix("import time:").split("|")
            package = name.strip().partition(".")[0]
            costs[package] += int(own) / 1000
            torch += [name.strip()] if package == "torch" else []
    return torch, costs


def main() -> None:
    parser = arguments("cli_startup", __doc__)
    parser.add_argument("--rounds", type=int, default=10, help="times that each command is run (default: 10)")
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 1
    record = Record(options, what="CPU seconds of sky commands that need no torch")
    sky = Path(sys.executable).with_name("sky")
    if not sky.exists():
        raise SystemExit(f"there is no {sky}; install the workspace: pip install --editable packages/sky-core")

    commands = {BARE: [sys.executable, "-c", "pass"]}
    commands |= {name: [str(sky), *words] for name, words in COMMANDS.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    costliest = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run.yaml").write_text(RUN, encoding="utf-8")
        for command in commands.values():
            cost(command, Path(folder))
        for _ in range(options.rounds):
            for name, command in commands.items():
                times[name].append(cost(command, Path(folder)))
        for name, words in COMMANDS.items():
            torch, costs = imports(words, Path(folder))
            record.measure(f"{name}: CPU", [run["cpu"] for run in times[name]], "s", at_most=0.6)
            record.measure(f"{name}: wall", [run["wall"] for run in times[name]], "s")
            record.measure(f"{name}: modules of torch imported", len(torch), "", at_most=0)
            costliest[name] = {package: round(cost, 1) for package, cost in costs.most_common(12)}
    record.measure(f"{BARE}: CPU", [run["cpu"] for run in times[BARE]], "s")
    record.save(runs=times, import_ms_by_package=costliest)


if __name__ == "__main__":
    run_script(main)
