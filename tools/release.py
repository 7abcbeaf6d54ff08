"""Check a release tag: `python tools/release.py sky-core-v0.3.0` prints the folder of the package it names.

The tag, the version in `pyproject.toml` and the top heading of `CHANGELOG.md` must agree; otherwise one line says what
differs and the exit code is 1. The release workflow builds and publishes only what this has printed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from workspace import ROOT, Package, packages


def released(tag: str, among: Iterable[Package]) -> Package:
    """The package that `tag` releases. Raises ValueError where tag, version and changelog disagree."""
    match = re.fullmatch(r"(?P<name>sky-[a-z0-9-]+)-v(?P<version>\d.*)", tag)
    if not match:
        raise ValueError(f"{tag!r} is no release tag; it looks like sky-core-v0.3.0")
    named = {package.name: package for package in among}
    if match["name"] not in named:
        raise ValueError(f"{tag!r} names no package here; have: {', '.join(named)}")
    package = named[match["name"]]
    if package.version != match["version"]:
        raise ValueError(f"{tag!r} but {package.name}/pyproject.toml says {package.version}")
    if package.released_version() != match["version"]:
        raise ValueError(f"{tag!r} but the top heading of {package.name}/CHANGELOG.md is {package.released_version()}")
    return package


if __name__ == "__main__":
    try:
        print(released(sys.argv[1], packages()).path.relative_to(Path(ROOT)))
    except (IndexError, ValueError) as error:
        sys.exit(f"release: {error if isinstance(error, ValueError) else 'which tag?'}")
