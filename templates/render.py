"""Render the plugin template: `python templates/render.py DEST --name my-plugin`. Standard library only.

The name gives everything else: the distribution sky-my-plugin, the module sky_my_plugin, the entry point my-plugin
and the kind my_plugin. DEST is a folder that does not exist yet or is empty.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

TEMPLATE = Path(__file__).resolve().parent / "plugin"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def words(name: str) -> dict[str, str]:
    """Placeholder -> what stands for it. Raises `ValueError` when `name` cannot name a distribution and a module."""
    name = name.removeprefix("sky-")
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r}: a name is lower-case words with dashes between them, as in my-plugin")
    kind = name.replace("-", "_")
    return {"__NAME__": name, "__DIST__": f"sky-{name}", "__MODULE__": f"sky_{kind}", "__KIND__": kind}


def filled(text: str, values: dict[str, str]) -> str:
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text


def render(destination: Path, name: str) -> list[Path]:
    """Write the template to `destination`; returns the files written. Raises `ValueError`, `FileExistsError`."""
    values = words(name)
    if destination.exists() and any(destination.iterdir()):
        raise FileExistsError(f"{destination} is not empty; choose a new folder")
    written = []
    for source in sorted(path for path in TEMPLATE.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        target = destination / filled(str(source.relative_to(TEMPLATE)), values)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(filled(source.read_text(encoding="utf-8"), values), encoding="utf-8")
        written.append(target)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("destination", type=Path, metavar="DEST", help="new folder for the plugin")
    parser.add_argument("--name", required=True, help="name of the plugin, as in my-plugin")
    options = parser.parse_args(arguments)
    try:
        written = render(options.destination, options.name)
    except (ValueError, FileExistsError) as error:
        sys.stderr.write(f"render.py: {error}\n")
        return 2
    sys.stderr.write(f"{len(written)} files in {options.destination}; next: see its README.md\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
