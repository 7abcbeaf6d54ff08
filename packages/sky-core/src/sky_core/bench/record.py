"""What a benchmark leaves behind: one JSON file with its numbers, the targets beside them, and where they came from.

    options = arguments("nano_parity", __doc__).parse_args()  # or Options("train"), from Python
    record = Record(options, what="...", seeds=[0, 1, 2])     # refuses here, not after an hour
    record.measure("loss", [1.89, 1.91, 1.88], "nats/token", at_most=1.90)
    record.save(runs=[...])

A measure is the median of its values with the quartiles, the lowest and the highest; its target is held to the median.
One that names which way is `better` is a ratio that `sky bench compare` guards. Numbers are only as good as the source
they came from: without `--allow-dirty` nothing is measured while a file of the repository differs from its commit
(files under benchmarks/results/ apart), and with it the record lists the files that differ. A source installed from a
wheel belongs to no repository: its version, which every record holds, says which one it is.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, Literal

import click

from sky_core.errors import SkyError, UserError
from sky_core.files import write_json
from sky_core.run_directory import machine

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the source that is measured."""

VERSIONS = ("torch", "numpy", "sky-core")


@dataclass(frozen=True)
class Options:
    """What a record needs to know; `out` is the result file, or the folder that `name`.json goes to."""

    name: str
    out: Path | None = None
    smoke: bool = False
    allow_dirty: bool = False


# ----------------------------------------------------------------------------------------------- where we are


@lru_cache
def repository(source: Path = PACKAGE) -> Path | None:
    """The root of the repository that `source` is a part of; None for one that was installed.

    An environment inside a checkout is no part of it: the file must be under version control.
    """

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=source, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    root = git("rev-parse", "--show-toplevel") if git("ls-files", "--error-unmatch", "__init__.py") else None
    return Path(root) if root else None


def results() -> Path | None:
    """Where records go by default: benchmarks/results/ of the source's repository, else of the current folder's."""
    for root in (repository(), Path.cwd()):
        if root is not None and (root / "benchmarks" / "results").is_dir():
            return root / "benchmarks" / "results"
    return None


def source_state(root: Path | None = None) -> dict[str, Any]:
    """The commit of the repository `root` (default: that of the source), and the files that differ from it.

    `commit` is null where there is no repository: `dirty` is then false for an installed package, whose version says
    what it is, and true for a folder of which nobody knows.
    """
    root = root or repository()

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=root, text=True, stderr=subprocess.DEVNULL)

    if root is None:
        return {"commit": None, "dirty": not _installed(), "changed_files": []}
    commit = git("rev-parse", "HEAD").strip()
    status = git("status", "--porcelain", "--untracked-files=all", "--", ".", ":(exclude)benchmarks/results")
    changed = [line[3:] for line in status.splitlines()]
    return {"commit": commit, "dirty": bool(changed), "changed_files": changed}


def _installed() -> bool:
    """Whether the source is that of an installed wheel (an editable installation is a folder somewhere else)."""
    try:
        file = distribution("sky-core").locate_file("sky_core/__init__.py")
    except PackageNotFoundError:
        return False
    return Path(str(file)).resolve() == PACKAGE / "__init__.py"


def environment(peers: Sequence[str] = ()) -> dict[str, Any]:
    """Machine and versions, those of the distributions `peers` among them.

    Names the GPU and the threads if the benchmark has imported torch.
    """

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    here = machine() | {"system": platform.platform()}
    if hasattr(os, "sysconf"):
        here["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if (torch := sys.modules.get("torch")) is not None:
        here["threads"] = torch.get_num_threads()
        here["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: installed(name) for name in dict.fromkeys([*VERSIONS, *peers])}
    return {"machine": here, "versions": {"python": platform.python_version(), **versions}}


def _command() -> str:
    """The command line as another reader could type it: from the repository's root, with data in $SKY_DATA; of what
    lies elsewhere on this machine, the last name."""
    root, script = repository(), Path(sys.argv[0])
    if script.name in ("sky", "__main__.py"):
        words = shlex.join(["sky", *sys.argv[1:]])
    else:
        words = shlex.join(["python", os.path.relpath(script, root or Path.cwd()), *sys.argv[1:]])
    for folder, name in ((os.environ.get("SKY_DATA"), "$SKY_DATA"), (root, "."), (Path.home(), "~")):
        words = words.replace(str(folder), name) if folder and str(folder) != "/" else words
    return re.sub(r"(?<![\w.$~/])/(?:[^\s'/]+/)+(?=[^\s'/])", "", words)


# ----------------------------------------------------------------------------------------------- measures


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest, highest and number of values; from four values on the quartiles as well."""
    found: dict[str, Any] = {"value": statistics.median(values), "low": min(values), "high": max(values)}
    found["n"] = len(values)
    if len(values) >= 4:
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        found |= {"quartiles": [first, third]}
    return found


def shown(value: float) -> str:
    """A number for a reader: whole if large or integer, else four significant digits."""
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


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


class Record:
    """One run of one benchmark. Raises `UserError` at once where the result could not be written.

    `peers` are the distributions whose versions belong to the numbers. Where there is no `options.out` and no folder of
    results, the record is printed and not written.
    """

    def __init__(
        self, options: Options | argparse.Namespace, *, what: str, seeds: Sequence[int] = (), peers: Sequence[str] = ()
    ) -> None:
        folder = results()
        self.path: Path | None = options.out
        if self.path is None and folder is not None and not options.smoke:
            self.path = folder
        if self.path is not None and self.path.suffix != ".json":
            self.path = self.path / f"{options.name}.json"
        if options.smoke and self.path is not None and folder and self.path.resolve().is_relative_to(folder):
            raise UserError(f"{self.path}: a smoke run measures nothing; write it elsewhere with --out")
        self._source = source_state()
        self._strict = not (options.smoke or options.allow_dirty)
        self._refused: str | None = None
        if self._strict and self._source["dirty"]:
            files = ", ".join(self._source["changed_files"][:5]) or "there is no git repository"
            raise UserError(f"the source is not that of a commit ({files}); commit it, or add --allow-dirty")
        self.measures: list[dict[str, Any]] = []
        self.peers = list(peers)
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
        better: Literal["higher", "lower"] | None = None,
    ) -> None:
        """Add a measured quantity with its target, if any, and a peer's (name, value) to compare it with.

        `better` makes it a ratio that `sky bench compare` holds to that of another record.
        """
        measure = {"what": what, "unit": unit, **spread([values] if isinstance(values, int | float) else values)}
        if at_most is not None:
            measure |= {"at_most": at_most, "met": measure["value"] <= at_most}
        if at_least is not None:
            measure |= {"at_least": at_least, "met": measure["value"] >= at_least}
        if peer is not None:
            measure["peer"] = {"name": peer[0], "value": peer[1]}
        if better is not None:
            measure["better"] = better
        self.measures.append(measure)

    def write(self, **details: Any) -> dict[str, Any]:
        """Write the record (`details` behind the measures) and return it; `finish` says where it went.

        A source that changed while it was measured is refused like one that had changed before: the record then goes
        to the folder for temporary files.
        """
        after = source_state()
        if after != self._source:
            changed = sorted({*after["changed_files"], *self._source["changed_files"]})
            self._source |= {"dirty": True, "changed_files": changed, "commit_at_end": after["commit"]}
        data = {**self._head, **self._source, **environment(self.peers), "measures": self.measures, **details}
        if self.path is not None:
            if self._strict and self._source["dirty"]:
                wanted, self.path = self.path, Path(tempfile.gettempdir(), self.path.name)
                self._refused = (
                    f"the source changed while it was measured; the record is in {self.path}, not in {wanted}"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, data)
        return data

    def finish(self) -> None:
        """Say where the record is. Raises `SkyError` when it was refused."""
        if self._refused:
            raise SkyError(self._refused)
        if self.path is not None:
            click.echo(f"wrote {self.path}", err=True)

    def save(self, **details: Any) -> None:
        """Write the record first of all (what is printed may go to a pipe that breaks), then print the measures."""
        self.write(**details)
        for measure in self.measures:
            click.echo(line(measure))
        self.finish()


# ----------------------------------------------------------------------------------------------- scripts


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that every script under benchmarks/ has; `name` names its result file."""
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


def run_script(main: Callable[[], None]) -> None:
    """A script's `main`; a known error is one line and exit code 1."""
    try:
        main()
    except SkyError as error:
        raise SystemExit(str(error)) from None
