"""A run directory: plain files, crash-safe; everything that looks at runs only reads them.

    runs/<utc>_<name>-<id4>/
      run.json         state (running, done, failed, stopped, diverged), pid, host, heartbeat, lineage, tags, reason
      config.yaml      resolved; config.input.yaml as given; command.txt; environment.json
      metrics.jsonl    one line per logged step; events.jsonl (evaluations, checkpoints); samples.jsonl; log.txt
      checkpoints/     step_000500/ ..., links last and best

Nothing here imports torch.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from sky_core.component import closest
from sky_core.config import Run, parse_run
from sky_core.errors import UserError
from sky_core.files import append_json_line, read_json_lines, write_atomic, write_json
from sky_core.plugins import loaded_plugins
from sky_core.yaml_file import dump_yaml, read_yaml

HEARTBEAT_SECONDS = 10.0
"""How often a live run renews its heartbeat."""

STALE_SECONDS = 60.0
"""A heartbeat older than this, with its process gone, means that the run crashed."""


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class RunDirectory:
    """One run on disk. `create` makes a new one, `open` reads an existing one."""

    path: Path

    @classmethod
    def create(cls, run: Run, *, config_input: str) -> RunDirectory:
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        directory = cls(Path(run.out) / f"{stamp}_{run.name}-{secrets.token_hex(2)}")
        (directory.path / "checkpoints").mkdir(parents=True)
        write_atomic(directory.path / "config.input.yaml", config_input)
        write_atomic(directory.path / "config.yaml", dump_yaml(run.as_dict()))
        write_atomic(directory.path / "command.txt", shlex.join(sys.argv) + "\n")
        write_json(directory.path / "environment.json", environment())
        directory.update(
            id=directory.path.name,
            name=run.name,
            state="created",
            pid=os.getpid(),
            host=socket.gethostname(),
            created=utc_now(),
            tags=run.tags,
            lineage={"init": run.init} if run.init else {},
        )
        return directory

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        if not (path / "run.json").is_file():
            raise UserError(f"{path}: this is no run directory (it has no run.json); `sky runs` lists the runs")
        return cls(path)

    @property
    def config(self) -> Run:
        """The resolved run."""
        data, lines = read_yaml(self.path / "config.yaml")
        return parse_run(data, lines, base=self.path)

    @property
    def info(self) -> dict[str, Any]:
        """run.json as it is on disk."""
        file = self.path / "run.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @property
    def state(self) -> str:
        """run.json's state, or `crashed` when a run that calls itself created or running is dead."""
        info = self.info
        state = str(info.get("state", "?"))
        if state not in ("created", "running"):
            return state
        stale = time.time() - float(info.get("heartbeat", 0)) > STALE_SECONDS
        here = info.get("host") == socket.gethostname()
        gone = not _alive(int(info.get("pid", -1))) if here else stale
        return "crashed" if gone else state

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, by step."""
        complete = [path.parent for path in (self.path / "checkpoints").glob("step_*/MANIFEST.json")]
        return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))

    def checkpoint(self, which: str = "last") -> Path:
        """The checkpoint called "last", "best" or "step_000500". Raises `UserError` listing what there is."""
        link = self.path / "checkpoints" / which
        if link.is_dir():
            return link.with_name(link.resolve().name)
        if which == "last" and self.checkpoints:  # the run died between a first checkpoint and its link
            return self.checkpoints[-1]
        have = ", ".join(path.name for path in self.checkpoints) or "none yet"
        raise UserError(f"{self.path}: there is no checkpoint {which!r} (have: {have})")

    def update(self, **fields: Any) -> None:
        """Change fields of run.json in one step."""
        write_json(self.path / "run.json", self.info | fields)

    def append_event(self, event: dict[str, Any]) -> None:
        append_json_line(self.path / "events.jsonl", {"time": utc_now(), **event})

    def events(self) -> list[dict[str, Any]]:
        return list(read_json_lines(self.path / "events.jsonl"))

    def metrics(self) -> list[dict[str, Any]]:
        return list(read_json_lines(self.path / "metrics.jsonl"))

    @contextmanager
    def log_file(self) -> Iterator[None]:
        """Inside, what the project and its plugins log also goes to log.txt, with the time."""
        handler = logging.FileHandler(self.path / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        handler.addFilter(lambda record: record.name.startswith("sky"))
        core, root = logging.getLogger("sky_core"), logging.getLogger()
        if not core.isEnabledFor(logging.INFO):
            core.setLevel(logging.INFO)
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
            handler.close()

    def lock(self) -> IO[str]:
        """Take the directory for this process; the lock dies with the process. Raises `UserError` when it is taken."""
        file = (self.path / ".lock").open("a+", encoding="utf-8")
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{self.path}: in use by {holder}; wait for it, or stop it with SIGTERM (it saves and exits)"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def list_runs(out: Path = Path("runs")) -> list[RunDirectory]:
    """The runs in a folder, oldest first."""
    return [RunDirectory(path.parent) for path in sorted(out.glob("*/run.json"))]


def find_run(source: str, out: Path = Path("runs")) -> tuple[RunDirectory, str]:
    """The run and the checkpoint name ("last", "best" or "step_000500") that `source` means.

    `source` is a directory, a run's id, name or unique prefix, `@last` (newest run) or `@best` (lowest validation
    loss), optionally followed by `@step`, `@last` or `@best`. Raises `UserError` listing what there is.
    """
    if (Path(source) / "run.json").is_file():
        return RunDirectory(Path(source)), "last"
    head, at, tail = source.rpartition("@")
    name, which = (head, tail) if at and head else (source, "last")
    checkpoint = f"step_{int(which):06d}" if which.isdigit() else which
    if checkpoint not in ("last", "best") and not which.isdigit():
        raise UserError(f"{source!r}: after @ stands a step, 'last' or 'best', not {which!r}")
    if (Path(name) / "run.json").is_file():
        return RunDirectory(Path(name)), checkpoint
    runs = list_runs(out)
    if not runs and not Path(name).is_dir():
        raise UserError(f"{source!r}: no such directory, and there are no runs in {out}/")
    if name == "@last":
        return runs[-1], checkpoint
    if name == "@best":
        scored = [run for run in runs if run.info.get("best_loss") is not None]
        if not scored:
            raise UserError(f"'@best': no run in {out}/ was evaluated yet")
        return min(scored, key=lambda run: run.info["best_loss"]), "best" if at and not head else checkpoint
    exact = [run for run in runs if name in (run.path.name, run.info.get("name"))]
    matches = exact or [run for run in runs if run.path.name.startswith(name) or run.info["name"].startswith(name)]
    if len(matches) > 1:
        raise UserError(f"{name!r} is ambiguous: {', '.join(run.path.name for run in matches)}")
    if not matches and Path(name).is_dir():
        return RunDirectory.open(Path(name)), checkpoint
    if not matches:
        known = [name for run in runs for name in (run.info["name"], run.path.name)]
        raise UserError(f"no run called {name!r} in {out}/{closest(name, known)}; `sky runs` lists them")
    return matches[0], checkpoint


def environment() -> dict[str, Any]:
    """Versions, machine and source state: what a result needs to be believed later."""

    def installed(distribution: str) -> str | None:
        try:
            return version(distribution)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": machine(),
        "versions": {name: installed(name) for name in ("torch", "numpy", "safetensors", "sentencepiece")},
        "plugins": loaded_plugins().versions(),
        "git": git_state(Path.cwd()),
    }


def machine() -> dict[str, Any]:
    """Processor model and cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the repository around `folder`; None outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)
        except FileNotFoundError:
            return None
        return result.stdout.decode(errors="replace") if result.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit.strip(), "dirty_patch": git("diff", "HEAD") or ""}
