"""`sky doctor`: what this machine and installation can do, and what to mend."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

OPTIONAL = (
    "sentencepiece", "tokenizers", "webdataset", "zstandard", "tensorboard", "lm_eval", "deepspeed", "xformers",
    "transformers",
)  # fmt: skip


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Check Python, torch, processor, memory, disk, extras and plugins; exit code 4 when something is broken."""
    from sky_core.errors import CheckFailed

    facts, notes, problems = examine()
    if as_json:
        click.echo(json.dumps({"facts": facts, "notes": notes, "problems": problems}, indent=1))
    else:
        for name, value in facts.items():
            click.echo(f"{name:<16} {value}")
        for note in notes:
            click.echo(f"note             {note}")
        for problem in problems:
            click.echo(f"problem          {problem}")
    if problems:
        raise CheckFailed(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found")


def examine() -> tuple[dict[str, Any], list[str], list[str]]:
    """(facts by name, notes on what passes, problems: what is broken), the last two as lines."""
    import platform

    import torch

    from sky_core.plugins import loaded_plugins
    from sky_core.run_directory import machine
    from sky_core.training.precision import resolve_precision

    here, notes, problems = machine(), [], []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > here["cores"] + 1:
        notes.append(f"load is {load:.1f} on {here['cores']} cores: other programs slow training down")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{here['cpu']} ({here['cores']} cores, {torch.get_num_threads()} torch threads, load {load:.1f})",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "precision": f"auto means {resolve_precision('auto', device)}",
        "memory": f"{_memory_gib():.1f} GiB free" if _memory_gib() else "unknown",
        "disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free in {Path.cwd()}",
        "extras": ", ".join(f"{name} {found}" for name in OPTIONAL if (found := _installed(name))) or "none",
    }
    loaded = loaded_plugins()
    for plugin in loaded.plugins:
        facts[f"plugin {plugin.name}"] = f"{plugin.distribution} {plugin.version} {plugin.status}"
        if plugin.status == "broken":
            problems.append(f"plugin {plugin.name}: {plugin.reason}")
    for lines in loaded.hook.sky_doctor():
        facts |= lines
    return facts, notes, problems


def _memory_gib() -> float:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0.0
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**20


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
