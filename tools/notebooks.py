"""Notebooks: `NN_name.py` (percent format) is the source, the executed `NN_name.ipynb` beside it is the result.

    python tools/notebooks.py run [NAME ...]     execute in full and write the .ipynb with its stamp
    python tools/notebooks.py smoke [NAME ...]   execute small, in a temporary copy, within a minute each
    python tools/notebooks.py check [NAME ...]   is every .ipynb the whole, clean, current result of its source?

A notebook is executed from a clean kernel in the notebooks folder. It sees its mode in `SKY_NOTEBOOK` (full or smoke)
and sets its seed once, at the top, as `SEED = 1234`. The stamp (`metadata.sky` of the .ipynb) holds the hash of the
source, versions, seed, machine, mode, date and wall time.

The rule for prose: a markdown cell that states a number with a decimal point, or compares (better, worse, faster,
slower, lower, higher), stands directly before or after a code cell that asserts it or reads it with `results(...)`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
BESIDE = ("benchmarks", "recipes")  # what a notebook may read through `..`, copied along in smoke mode
SMOKE_SECONDS = 60.0
FULL_SECONDS = 3 * 3600.0

CLAIM = re.compile(r"\d\.\d|\b(?:better|worse|faster|slower|lower|higher)\b", re.IGNORECASE)
NO_CLAIM = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|\]\([^)]*\)|<[^>]*>|https?://\S+"  # code, formulas, links
    r"|arXiv:\s?\d{4}\.\d{4,5}"
    r"|(?:sections?|figures?|fig\.|tables?|equations?|eq\.|chapters?|appendix|§|Python|version)\s*\d+(?:\.\d+)+",
    re.IGNORECASE | re.DOTALL,
)


def sources(names: Sequence[str] = (), folder: Path = FOLDER) -> list[Path]:
    """The sources, all or those named (`01`, `01_attention_is_all_you_need` or a path). Raises SystemExit on others."""
    found = sorted(folder.glob("[0-9][0-9]_*.py"))
    if not names:
        return found
    chosen = [path for path in found for name in names if path.stem.startswith(Path(name).stem)]
    if not chosen:
        raise SystemExit(f"no notebook called {', '.join(names)}; have: {', '.join(path.stem for path in found)}")
    return chosen


def source_hash(source: Path) -> str:
    return hashlib.sha256(source.read_text(encoding="utf-8").encode()).hexdigest()


def seed_of(source: Path) -> int:
    """The integer that the notebook assigns to SEED. Raises ValueError where it assigns none."""
    seed = re.search(r"^SEED = (\d+)", source.read_text(encoding="utf-8"), re.MULTILINE)
    if seed:
        return int(seed[1])
    raise ValueError(f"{source.name} sets no seed; write `SEED = 1234` in its first code cell")


def machine() -> dict[str, Any]:
    """The processor and its number of cores, as far as this process may use them."""
    model = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        model = names[0].strip() if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def versions() -> dict[str, str]:
    """Python, torch and every package of ours that is installed."""
    ours = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name.startswith("sky-")}
    theirs = {name: importlib.metadata.version(name) for name in ("torch", "numpy") if _installed(name)}
    return {"python": platform.python_version(), **dict(sorted(theirs.items())), **dict(sorted(ours.items()))}


def _installed(name: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=name)))


def execute(source: Path, mode: str, limit: float) -> nbformat.NotebookNode:
    """Run `source` top to bottom from a clean kernel in its own folder and return the stamped notebook.

    `limit` is in seconds for the whole notebook. Raises CellExecutionError at the first cell that fails and
    TimeoutError when the time is up.
    """
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"  # random ids would make every run a new diff
    seed = seed_of(source)
    start = time.monotonic()
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout_func=lambda _cell: max(1, round(limit - (time.monotonic() - start))),
        record_timing=False,
        resources={"metadata": {"path": str(source.parent)}},
    )
    client.execute(env={**os.environ, "SKY_NOTEBOOK": mode, "PYTHONHASHSEED": "0"})
    seconds = time.monotonic() - start
    if seconds > limit:
        raise TimeoutError(f"it took {seconds:.0f} s; the limit is {limit:.0f} s")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "sky": {
            "source_sha256": source_hash(source),
            "mode": mode,
            "seed": seed,
            "versions": versions(),
            "machine": machine(),
            "date": datetime.now(UTC).date().isoformat(),
            "wall_time_s": round(seconds, 1),
        },
    }
    return notebook


def problems(source: Path) -> Iterator[str]:
    """Everything that keeps the .ipynb beside `source` from being its result, one line each; none when all is well."""
    result = source.with_suffix(".ipynb")
    yield from claim_problems(source)
    try:
        seed_of(source)
    except ValueError as error:
        yield str(error)
    again = f"run: python tools/notebooks.py run {source.stem}"
    if not result.exists():
        yield f"{result.name} is missing; {again}"
        return
    notebook = nbformat.read(result, as_version=4)
    stamp = notebook.metadata.get("sky", {})
    if stamp.get("source_sha256") != source_hash(source):
        yield f"{result.name} is stale: {source.name} has changed since; {again}"
    elif [(c.cell_type, c.source) for c in notebook.cells] != [(c.cell_type, c.source) for c in _cells(source)]:
        yield f"{result.name} was edited by hand: its cells are not those of {source.name}; {again}"
    if stamp.get("mode") != "full":
        yield f"{result.name} is not the result of a full run (mode: {stamp.get('mode')}); {again}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        yield f"{result.name} was not executed once from top to bottom (counts: {counts}); {again}"
    for cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"{result.name}: cell {cell.execution_count} ended in {output.ename}: {output.evalue}"


def _cells(source: Path) -> list[nbformat.NotebookNode]:
    return list(jupytext.read(source).cells)


def claim_problems(source: Path) -> Iterator[str]:
    """Markdown cells that claim something with no assertion and no `results(...)` in the code beside them."""
    cells = _cells(source)
    for position, cell in enumerate(cells):
        claim = CLAIM.search(NO_CLAIM.sub(" ", cell.source)) if cell.cell_type == "markdown" else None
        beside = [cells[i] for i in (position - 1, position + 1) if 0 <= i < len(cells)]
        if claim and not any(other.cell_type == "code" and holds_to_truth(other.source) for other in beside):
            title = cell.source.strip().splitlines()[0][:60]
            yield f"{source.name}: {claim[0]!r} in {title!r} has no assert and no results(...) in the code beside it"


def holds_to_truth(code: str) -> bool:
    """Whether a code cell has an assert statement or reads recorded results."""
    return bool(re.search(r"^\s*assert\b|\bresults\(", code, re.MULTILINE))


def run(source: Path) -> None:
    """Execute in full, in place, and write the result beside the source."""
    nbformat.write(execute(source, "full", FULL_SECONDS), source.with_suffix(".ipynb"))


def smoke(source: Path, limit: float = SMOKE_SECONDS) -> None:
    """Execute in smoke mode in a temporary copy: whatever the notebook writes, the repository stays as it is."""
    with tempfile.TemporaryDirectory(prefix="sky-notebook-") as temporary:
        for name in BESIDE:
            if (source.parent.parent / name).is_dir():
                shutil.copytree(source.parent.parent / name, Path(temporary) / name)
        copy = Path(temporary) / source.parent.name / source.name
        copy.parent.mkdir()
        shutil.copy2(source, copy)
        execute(copy, "smoke", limit)


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(prog="notebooks.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("action", choices=["run", "smoke", "check"])
    parser.add_argument("name", nargs="*", help="which notebooks; all when absent")
    options = parser.parse_args(arguments)
    failed = 0
    for source in sources(options.name, folder):
        start = time.monotonic()
        try:
            if options.action == "run":
                run(source)
            elif options.action == "smoke":
                smoke(source)
            found = list(claim_problems(source) if options.action == "smoke" else problems(source))
        except (CellExecutionError, TimeoutError, ValueError) as error:
            found = [f"{source.name}: {error}"]
        failed += bool(found)
        print(f"{source.stem}: {'FAILED' if found else 'ok'} ({time.monotonic() - start:.1f} s)", flush=True)
        for line in found:
            print(f"  {line}", file=sys.stderr, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
