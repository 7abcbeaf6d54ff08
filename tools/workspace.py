"""The packages of this repository as their own metadata describes them: discovered, never listed.

Used by the noxfile, by the release workflow and by `tests/test_house.py`. Needs the standard library and `packaging`.
`python tools/workspace.py` prints the size of every module in lines, the longest first.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^## \[?v?(?P<version>\d+\.\d+[^\s\]]*)")


@dataclass(frozen=True)
class Package:
    """One distribution: a folder with a `pyproject.toml`."""

    path: Path

    @cached_property
    def project(self) -> dict[str, Any]:
        """The `[project]` table."""
        return dict(tomllib.loads((self.path / "pyproject.toml").read_text(encoding="utf-8"))["project"])

    @property
    def name(self) -> str:
        return canonicalize_name(self.project["name"])

    @property
    def module(self) -> str:
        """The import name: `sky_core` for `sky-core`."""
        return self.name.replace("-", "_")

    @property
    def version(self) -> str:
        return str(self.project["version"])

    @property
    def extras(self) -> dict[str, list[str]]:
        return dict(self.project.get("optional-dependencies", {}))

    def requirements(self, *extras: str) -> list[Requirement]:
        """What the package declares, with the extras named; only what applies to this platform and Python."""
        texts = [*self.project.get("dependencies", []), *(text for extra in extras for text in self.extras[extra])]
        requirements = [Requirement(text) for text in texts]
        return [need for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]

    def released_version(self) -> str | None:
        """The version in the top heading of the changelog, or None where there is none."""
        changelog = self.path / "CHANGELOG.md"
        if not changelog.exists():
            return None
        headings = (line for line in changelog.read_text(encoding="utf-8").splitlines() if line.startswith("## "))
        top = HEADING.match(next(headings, ""))
        return top["version"] if top else None

    def target(self, *extras: str) -> str:
        """What pip installs: this folder (never the name: an index could hold another project under it)."""
        return f"{self.path}[{','.join(extras)}]" if extras else str(self.path)


def packages(root: Path = ROOT) -> list[Package]:
    """Every package of the repository, core first (everything else builds on it), then by name."""
    found = [Package(file.parent) for file in root.glob("packages/*/pyproject.toml")]
    return sorted(found, key=lambda package: (package.name != "sky-core", package.name))


def siblings(package: Package, among: Iterable[Package], *extras: str) -> list[Package]:
    """The packages of this repository that `package` needs, directly or through one another, itself excluded."""
    by_name = {other.name: other for other in among}
    found: dict[str, Package] = {}

    def visit(requirements: Iterable[Requirement]) -> None:
        for need in requirements:
            name = canonicalize_name(need.name)
            if name in by_name and name not in found and name != package.name:
                found[name] = by_name[name]
                visit(by_name[name].requirements())

    visit(package.requirements(*extras))
    return list(found.values())


def modules(package: Package) -> list[Path]:
    """The source files of a package."""
    return sorted((package.path / "src").rglob("*.py"))


def line_counts(package: Package) -> dict[str, int]:
    """The number of lines of each module, the longest first."""
    sizes = {str(p.relative_to(package.path)): len(p.read_text("utf-8").splitlines()) for p in modules(package)}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def lower_bounds(requirements: Iterable[Requirement]) -> Iterator[tuple[str, Version]]:
    """(name, lowest version allowed) of each requirement. Raises ValueError where no lower bound is declared."""
    for need in requirements:
        bounds = [Version(spec.version) for spec in need.specifier if spec.operator in (">=", "==", "~=")]
        if not bounds:
            raise ValueError(f"{need} declares no lower bound; write the oldest version that is known to work")
        yield canonicalize_name(need.name), max(bounds)


def lowest(requirements: Iterable[Requirement], apart: Iterable[str] = ()) -> dict[str, str]:
    """The lowest version that satisfies all of `requirements`, by name, leaving out the names in `apart`."""
    floor: dict[str, Version] = {}
    for name, version in lower_bounds(need for need in requirements if canonicalize_name(need.name) not in set(apart)):
        floor[name] = max(version, floor.get(name, version))
    return {name: str(version) for name, version in sorted(floor.items())}


def pinned(name: str, root: Path = ROOT) -> str:
    """The version to which `constraints.txt` pins `name`."""
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        requirement, _, version = line.partition("==")
        if requirement.strip() == name:
            return version.strip()
    raise ValueError(f"constraints.txt does not pin {name}")


if __name__ == "__main__":
    for each in packages():
        sizes = line_counts(each)
        print(f"{each.name}: {sum(sizes.values())} lines in {len(sizes)} files")
        for name, lines in sizes.items():
            print(f"{lines:>6}  {name}")
