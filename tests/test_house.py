"""The rules of the house (docs/architecture.md, CONTRIBUTING.md), held to the repository itself.

Each rule is a function that returns what breaks it. The rule is tested on this repository, and the function on a small
repository that breaks it: a guard that cannot fail guards nothing.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from release import released
from workspace import ROOT, Package, line_counts, lower_bounds, modules, packages, pinned, siblings

PACKAGES = packages()
MAX_LINES = 400
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".jsonl", ".ipynb", ".cfg", ".sh", ".j2", ""}


def tracked(root: Path = ROOT) -> list[Path]:
    """The text files under version control."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=root, text=True).split("\0")
    return [root / name for name in names if name and Path(name).suffix in TEXT and (root / name).is_file()]


# ---------------------------------------------------------------------------------------------- the rules


def incomplete(package: Package) -> Iterator[str]:
    """What every package has: metadata, a README, a changelog, sources, tests, and a face that lists what it offers."""
    source = package.path / "src" / package.module
    needed = [package.path / "README.md", package.path / "CHANGELOG.md", package.path / "tests"]
    needed += [source / "__init__.py", source / "py.typed", source / "plugin.py"]
    yield from (f"{package.name}: {path.relative_to(package.path)} is missing" for path in needed if not path.exists())
    if not list(package.path.glob("tests/test_*.py")):
        yield f"{package.name}: it has no tests"
    if "test" not in package.extras:
        yield f"{package.name}: it declares no `test` extra"
    for key in ("description", "license", "readme", "requires-python"):
        if key not in package.project:
            yield f"{package.name}: pyproject.toml does not say its {key}"


def unbounded(package: Package) -> Iterator[str]:
    """Requirements without a lower bound, or torch with an upper one."""
    needs = [need for extra in ("", *package.extras) for need in package.requirements(*filter(None, [extra]))]
    for need in needs:
        try:
            if need.name not in {other.name for other in PACKAGES}:
                list(lower_bounds([need]))
        except ValueError as error:
            yield f"{package.name}: {error}"
        if need.name == "torch" and any(spec.operator not in (">=", "!=") for spec in need.specifier):
            yield f"{package.name}: {need}: a library leaves the choice of torch to its user; state a lower bound only"


def unreleased(package: Package) -> Iterator[str]:
    """The top heading of the changelog is the version of the package."""
    if package.released_version() != package.version:
        yield f"{package.name}: pyproject.toml says {package.version}, CHANGELOG.md says {package.released_version()}"


def oversized(package: Package) -> Iterator[str]:
    """Modules longer than a sitting."""
    for name, lines in line_counts(package).items():
        if lines > MAX_LINES:
            yield f"{name}: {lines} lines; one technique, one file, at most {MAX_LINES}"


def imported_roots(path: Path) -> set[str]:
    """The top-level names that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def strangers(package: Package, others: list[Package]) -> Iterator[str]:
    """Imports of another plugin: what two plugins share goes through a slot in core."""
    allowed = {package.module, "sky_core"}
    ours = {other.module for other in others}
    for path in modules(package):
        for name in sorted(imported_roots(path) & ours - allowed):
            yield f"{path.relative_to(package.path)} imports {name}"


def heavy_face(package: Package) -> Iterator[str]:
    """A `plugin.py` that imports torch: every `sky --help` would wait for it."""
    path = os.pathsep.join(str(other.path / "src") for other in (package, *siblings(package, PACKAGES)))
    code = f"import {package.module}.plugin, sys; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        yield f"{package.module}.plugin imports torch" if not done.stderr else done.stderr.strip().splitlines()[-1]


def traces(text: str, checkout: Path = ROOT) -> Iterator[str]:
    """Words that belong on one machine or on tomorrow's list."""
    to_do = re.compile(r"\b(" + "TO" + "DO|FIX" + r"ME)\b")
    home = re.compile(r"/(?:home|root|Users)/\w[\w./-]*")
    elsewhere = re.compile(re.escape("../" + "shared"))
    here = re.compile(re.escape(f"{checkout}/"))
    yield from (match[0] for pattern in (to_do, home, elsewhere, here) for match in pattern.finditer(text))


# ------------------------------------------------------------------------------------ held to this repository

each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)


@each_package
def test_a_package_is_complete(package: Package) -> None:
    assert list(incomplete(package)) == []


@each_package
def test_every_requirement_has_a_lower_bound_and_torch_nothing_else(package: Package) -> None:
    assert list(unbounded(package)) == []


@each_package
def test_the_changelog_opens_with_the_current_version(package: Package) -> None:
    assert list(unreleased(package)) == []


@each_package
def test_a_module_is_read_in_one_sitting(package: Package) -> None:
    assert list(oversized(package)) == []


@each_package
def test_a_package_imports_core_and_itself_but_no_other_plugin(package: Package) -> None:
    assert list(strangers(package, PACKAGES)) == []


@each_package
def test_the_face_of_a_plugin_imports_no_torch(package: Package) -> None:
    assert list(heavy_face(package)) == []


def test_no_file_carries_a_trace_of_one_machine_or_of_unfinished_work() -> None:
    found = {
        str(path.relative_to(ROOT)): words
        for path in tracked()
        if path.relative_to(ROOT).parts[0] != ".ci" and (words := list(traces(path.read_text("utf-8"))))
    }
    assert found == {}


def test_torch_is_pinned_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", pinned("torch"))


def test_all_packages_ask_for_the_same_oldest_python() -> None:
    assert len({package.project["requires-python"] for package in PACKAGES}) == 1


# ------------------------------------------------------------------------------------------ the guards can fail


@pytest.fixture
def broken(tmp_path: Path) -> Package:
    """A package that breaks every rule."""
    path = tmp_path / "packages" / "sky-broken"
    source = path / "src" / "sky_broken"
    source.mkdir(parents=True)
    (path / "pyproject.toml").write_text(
        '[project]\nname = "sky-broken"\nversion = "0.2.0"\ndependencies = ["numpy", "torch>=2.6,<3"]\n'
    )
    (path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.1.0 (2026-01-02)\n\n- Begun.\n")
    (source / "__init__.py").touch()
    (source / "plugin.py").write_text("import sys\n\nsys.modules['torch'] = sys\n")
    (source / "long.py").write_text("import sky_core.plugins\nfrom sky_other.plugin import x\n" + "pass\n" * MAX_LINES)
    return Package(path)


def test_the_guards_find_what_is_broken(broken: Package, tmp_path: Path) -> None:
    other = tmp_path / "packages" / "sky-other"
    other.mkdir()
    (other / "pyproject.toml").write_text('[project]\nname = "sky-other"\nversion = "0.1.0"\n')
    assert len(list(incomplete(broken))) == 9
    assert [line.split(": ")[1].split(" ")[0] for line in unbounded(broken)] == ["numpy", "torch<3,>=2.6"]
    assert list(unreleased(broken)) == ["sky-broken: pyproject.toml says 0.2.0, CHANGELOG.md says 0.1.0"]
    assert [line.split(":")[0] for line in oversized(broken)] == ["src/sky_broken/long.py"]
    assert list(strangers(broken, packages(tmp_path))) == ["src/sky_broken/long.py imports sky_other"]
    assert list(heavy_face(broken)) == ["sky_broken.plugin imports torch"]


@pytest.mark.parametrize(
    "words", ["TO" + "DO: later", "/home" + "/someone/runs", "cat .." + "/shared/data", f"{ROOT}/x"]
)
def test_a_trace_is_found(words: str) -> None:
    assert len(list(traces(f"text {words} text"))) >= 1


def test_a_broken_face_is_not_taken_for_a_light_one(broken: Package) -> None:
    (broken.path / "src" / "sky_broken" / "plugin.py").write_text("import no_such_module\n")
    assert list(heavy_face(broken)) == ["ModuleNotFoundError: No module named 'no_such_module'"]


def test_a_missing_pin_is_found(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("# torch==1.0\nnumpy==2.0\n")
    with pytest.raises(ValueError, match="does not pin torch"):
        pinned("torch", tmp_path)


@pytest.mark.parametrize(
    ("tag", "complaint"),
    [
        ("v0.2.0", "no release tag"),
        ("sky-unknown-v0.2.0", "names no package"),
        ("sky-broken-v0.3.0", "pyproject.toml says 0.2.0"),
        ("sky-broken-v0.2.0", "top heading"),
    ],
)
def test_a_release_that_contradicts_itself_is_refused(broken: Package, tag: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        released(tag, [broken])


def test_a_release_that_agrees_with_itself_goes_through(broken: Package) -> None:
    (broken.path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0 (2026-01-03)\n")
    assert released("sky-broken-v0.2.0", [broken]) == broken
