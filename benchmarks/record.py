"""What a benchmark leaves behind: one JSON file with its numbers, the targets beside them, and where they came from.

    options = arguments("nano_parity", __doc__).parse_args()
    record = Record(options, what="...", seeds=[0, 1, 2])     # refuses here, not after an hour
    record.measure("loss", [1.89, 1.91, 1.88], "nats/token", at_most=1.90)
    record.save(runs=[...])

A measure is the median of its values with the lowest and the highest; its target is held to the median. Numbers are
only as good as the source they came from: without `--allow-dirty` nothing is measured while a file of the repository
differs from its commit (files under benchmarks/results/ apart), and with it the record lists the files that differ.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sky_core.files import write_json
from sky_core.run_directory import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; `name` names its result file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(name=name)
    parser.add_argument("--out", type=Path, help=f"result file (default: benchmarks/results/{name}.json)")
    parser.add_argument(
        "--smoke", action="store_true", help="the smallest run that goes through everything; recorded only with --out"
    )
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="measure although files differ from the commit; the record lists them",
    )
    return parser


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """The option `--data`: the text of tinyshakespeare."""
    folder = os.environ.get("SKY_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        required=folder is None,
        default=folder and Path(folder, "tinyshakespeare", "input.txt"),
        help="a text file (default: $SKY_DATA/tinyshakespeare/input.txt)",
    )


def source_state() -> dict[str, Any]:
    """The commit, and the files that differ from it; `commit` is null where there is no repository."""

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=ROOT, text=True, stderr=subprocess.DEVNULL)

    try:
        commit = git("rev-parse", "HEAD").strip()
        status = git("status", "--porcelain", "--untracked-files=all", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": True, "changed_files": []}
    changed = [line[3:] for line in status.splitlines()]
    return {"commit": commit, "dirty": bool(changed), "changed_files": changed}


def environment() -> dict[str, Any]:
    """Machine and versions. Names the GPU and the threads if the benchmark has imported torch."""

    def installed(distribution: str) -> str | None:
        try:
            return version(distribution)
        except PackageNotFoundError:
            return None

    here = machine() | {"system": platform.platform()}
    if hasattr(os, "sysconf"):
        here["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if (torch := sys.modules.get("torch")) is not None:
        here["threads"] = torch.get_num_threads()
        here["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: installed(name) for name in ("torch", "numpy", "sky-core")}
    return {"machine": here, "versions": {"python": platform.python_version(), **versions}}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest, highest and number of values."""
    return {"value": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def shown(value: float) -> str:
    """A number for a reader: whole if large or integer, else four significant digits."""
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


class Record:
    """One run of one benchmark. Exits at once where the result could not be written."""

    def __init__(self, options: argparse.Namespace, *, what: str, seeds: Sequence[int] = ()) -> None:
        self.path: Path | None = options.out or (None if options.smoke else RESULTS / f"{options.name}.json")
        if options.smoke and self.path is not None and self.path.resolve().is_relative_to(RESULTS):
            raise SystemExit(f"{self.path}: a smoke run measures nothing; write it elsewhere with --out")
        self._source = source_state()
        self._strict = not (options.smoke or options.allow_dirty)
        if self._strict and self._source["dirty"]:
            files = ", ".join(self._source["changed_files"][:5]) or "there is no git repository"
            raise SystemExit(f"the source is not that of a commit ({files}); commit it, or add --allow-dirty")
        self.measures: list[dict[str, Any]] = []
        self._head = {
            "name": options.name,
            "what": what,
            "command": _command(),
            "smoke": options.smoke,
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "seeds": list(seeds),
        }

    def measure(
        self,
        what: str,
        values: float | Sequence[float],
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        peer: tuple[str, float] | None = None,
    ) -> None:
        """Add a measured quantity with its target, if any, and a peer's (name, value) to compare it with."""
        measure = {"what": what, "unit": unit, **spread([values] if isinstance(values, int | float) else values)}
        if at_most is not None:
            measure |= {"at_most": at_most, "met": measure["value"] <= at_most}
        if at_least is not None:
            measure |= {"at_least": at_least, "met": measure["value"] >= at_least}
        if peer is not None:
            measure["peer"] = {"name": peer[0], "value": peer[1]}
        self.measures.append(measure)

    def save(self, **details: Any) -> None:
        """Write the record (`details` behind the measures) and print the measures.

        A source that changed while it was measured is refused like one that had changed before: the record then goes
        to the folder for temporary files.
        """
        after = source_state()
        if after != self._source:
            changed = sorted({*after["changed_files"], *self._source["changed_files"]})
            self._source |= {"dirty": True, "changed_files": changed, "commit_at_end": after["commit"]}
        data = {**self._head, **self._source, **environment(), "measures": self.measures, **details}
        path, refused = self.path, self._strict and self._source["dirty"]
        if path is not None:  # first of all: what is printed may go to a pipe that breaks
            path = Path(tempfile.gettempdir(), path.name) if refused else path
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, data)
        for measure in self.measures:
            print(line(measure))
        if refused:
            raise SystemExit(f"the source changed while it was measured; the record is in {path}, not in {self.path}")
        if path is not None:
            print(f"wrote {path}")


def line(measure: dict[str, Any]) -> str:
    """A measure as one line of text."""
    words = [f"{measure['what']}: {shown(measure['value'])} {measure['unit']}"]
    if measure["n"] > 1:
        words.append(f"({shown(measure['low'])} to {shown(measure['high'])}, {measure['n']} runs)")
    if "met" in measure:
        words.append(f"target {target(measure)}: {'met' if measure['met'] else 'NOT MET'}")
    return " ".join(words)


def target(measure: dict[str, Any]) -> str:
    """`≤ 1.9`, `≥ 50,000,000`, or nothing."""
    if "at_most" in measure:
        return f"≤ {shown(measure['at_most'])}"
    return f"≥ {shown(measure['at_least'])}" if "at_least" in measure else ""


def _command() -> str:
    """The command line as another reader could type it: from the repository's root, with data in $SKY_DATA."""
    script = os.path.relpath(sys.argv[0], ROOT)
    words = shlex.join(["python", script, *sys.argv[1:]])
    for folder, name in ((os.environ.get("SKY_DATA"), "$SKY_DATA"), (str(ROOT), "."), (str(Path.home()), "~")):
        words = words.replace(folder, name) if folder and folder != "/" else words
    return words
