"""The test matrix. `nox -l` lists it, `nox -s "tests-3.11(sky-core, torch-2.13.0)"` runs one cell, `make test` all.

Every session has its own environment. torch is installed first and alone, at the version that constraints.txt pins, so
that no later requirement can pull in another build; our own packages are installed by path, never by name.
A cell that cannot be had here (no such interpreter, no such torch) is skipped with a line that says why.

Environment variables:
    SKY_TORCH_INDEX   an index that holds CPU builds of torch, for machines where the default one offers CUDA builds
    SKY_TORCH_CUDA    1: take CUDA builds (several gigabytes each) for every cell of the matrix
    SKY_DATA          a folder with the real data sets; tests that need them are skipped without it
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import nox
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from workspace import Package, lowest, packages, pinned, siblings  # noqa: E402

nox.needs_version = ">=2026.10"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.stop_on_first_error = False

PYTHONS = ["3.11", "3.12", "3.13"]
PACKAGES = packages()
CORE = PACKAGES[0]
TORCH = pinned("torch")
PYPROJECT = nox.project.load_toml("pyproject.toml")
REPORTS = ROOT / ".nox" / "reports"
FIRST_PARTY = {package.name: package for package in PACKAGES}

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are tiny, and two sessions may run side by side
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.update(
    PIP_DISABLE_PIP_VERSION_CHECK="1",
    PIP_NO_COMPILE="1",  # byte-compiling all of torch takes longer than unpacking it
    PYTHONNOUSERSITE="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)


def group(name: str) -> list[str]:
    """The requirements of a dependency group of the root pyproject.toml."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


def oldest_torch(package: Package) -> str:
    """The oldest torch that a package and what it builds on still allow."""
    needs = [*package.requirements(), *(need for other in siblings(package, PACKAGES) for need in other.requirements())]
    return lowest([need for need in needs if need.name == "torch"])["torch"]


def torch_offer(session: nox.Session, version: str) -> str:
    """What pip would install as this torch: "cpu", "cuda" or "none"; asked once per interpreter and remembered."""
    remembered = ROOT / ".nox" / f"torch-{version}-py{session.python or sys.version_info.minor}.offer"
    if not remembered.exists():
        report = Path(session.create_tmp()) / "torch.json"
        report.unlink(missing_ok=True)
        ask = ["pip", "install", "-qq", "--dry-run", "--no-deps", "--report", str(report), *torch_from(version)]
        session.run("python", "-m", *ask, silent=True, success_codes=range(256))
        offer = "none"
        if report.exists():
            (found,) = json.loads(report.read_text())["install"]
            needs = [Requirement(text) for text in found["metadata"].get("requires_dist", [])]
            here = [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
            offer = "cuda" if any(name.startswith(("nvidia-", "cuda-")) for name in here) else "cpu"
        remembered.write_text(offer)
    return remembered.read_text()


def torch_from(version: str) -> list[str]:
    index = os.environ.get("SKY_TORCH_INDEX")
    return [*(["--index-url", index] if index else []), f"torch=={version}"]


def install(session: nox.Session, *targets: str, torch: str = TORCH) -> None:
    """Install torch, then `targets` beside exactly that torch. Skips the session where this torch cannot be had."""
    offer = torch_offer(session, torch)
    here = f"torch {torch} for Python {session.python or '.'.join(map(str, sys.version_info[:2]))}"
    main_cell = torch == TORCH and session.python in (None, False, f"{sys.version_info.major}.{sys.version_info.minor}")
    if offer == "none":
        session.skip(f"no {here} is on offer here")
    if offer == "cuda" and not os.environ.get("SKY_TORCH_CUDA"):
        advice = "a CUDA build of several gigabytes; set SKY_TORCH_INDEX to an index of CPU builds"
        if not main_cell:
            session.skip(f"{here} is on offer only as {advice}, or SKY_TORCH_CUDA=1 to take it")
        session.warn(f"{here} is {advice} to avoid it")
    session.install(*torch_from(torch))
    session.install(f"torch=={torch}", *targets)


def pytest(session: nox.Session, *args: str, **env: str) -> None:
    """Run pytest under the root configuration; the counts go to `.nox/reports`, where `make test` adds them up."""
    report = REPORTS / (re.sub(r"[^\w.]+", "-", session.name).strip("-") + ".xml")
    options = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", f"--junitxml={report}"]
    session.run("python", "-m", "pytest", *options, *args, *session.posargs, env=env)


def own_tests(session: nox.Session, package: Package) -> None:
    """A package's tests, without those that need the reference libraries."""
    pytest(session, str(package.path / "tests"), f"--ignore={package.path / 'tests' / 'oracles'}")


def with_siblings(package: Package, *extras: str) -> list[str]:
    return [package.target(*extras), *(other.target() for other in siblings(package, PACKAGES, *extras))]


# Parameters are names: nox writes them into its report.
package_and_torch = nox.parametrize(
    "package, torch",
    [
        nox.param(package.name, version, id=f"{package.name}, torch-{version}")
        for package in PACKAGES
        for version in dict.fromkeys([TORCH, oldest_torch(package)])
    ],
)


@nox.session
def lint(session: nox.Session) -> None:
    """Format, style and types; `nox -s lint -- fix` rewrites what can be rewritten. Needs no torch."""
    needs = [str(need) for package in PACKAGES for need in package.requirements()]
    session.install(*group("lint"), *(n for n in needs if Requirement(n).name not in {"torch", *FIRST_PARTY}))
    fix = "fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []))
    session.run("ruff", "format", *([] if fix else ["--check"]))
    sources = [str(package.path / "src") for package in PACKAGES]
    session.run("mypy", "noxfile.py", "tools", *sources, env={"MYPYPATH": os.pathsep.join(sources)})
    session.run("python", "tools/workspace.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    session.install(*group("docs"))
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html", *session.posargs)


@nox.session(python=PYTHONS)
@package_and_torch
def tests(session: nox.Session, package: str, torch: str) -> None:
    """One package's tests, with only what it declares: its dependencies and its `test` extra."""
    install(session, *with_siblings(FIRST_PARTY[package], "test"), torch=torch)
    own_tests(session, FIRST_PARTY[package])


@nox.session
@nox.parametrize("package", names := [p.name for p in PACKAGES if "oracles" in p.extras], ids=names)
def oracles(session: nox.Session, package: str) -> None:
    """Against the reference libraries: tests/oracles, and the test files that skip themselves without a library."""
    install(session, *with_siblings(FIRST_PARTY[package], "test", "oracles"))
    folder = FIRST_PARTY[package].path / "tests"
    optional = [file for file in folder.glob("test_*.py") if "importorskip" in file.read_text("utf-8")]
    pytest(session, *map(str, sorted([*folder.glob("oracles"), *optional])))


@nox.session
def peers(session: nox.Session) -> None:
    """Against libraries that the reference libraries do not bear beside them: litgpt pins an older huggingface-hub, and
    transformers imports torchao wherever it finds it."""
    needs = ("lightning>=2.6", "torchmetrics", "psutil", "jsonargparse[signatures]>=4.37,<=4.41")
    install(session, CORE.target("test", "bench"), *needs)
    session.install("--no-deps", "litgpt>=0.5.13,<0.6", "torchao>=0.18")
    session.run("python", "-c", "import litgpt, torchao", silent=True)  # what does not import would only be skipped
    folder = CORE.path / "tests" / "oracles"
    pytest(session, str(folder / "test_bench_peers.py"), str(folder / "test_quantization.py"))


@nox.session
def alone(session: nox.Session) -> None:
    """Core from its wheel: no plugin, no extra."""
    wheels = Path(session.create_tmp()) / "wheels"
    session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), CORE.target(), silent=True)
    install(session, str(max(wheels.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime)), "pytest")
    pytest(session, str(CORE.path / "tests" / "test_alone.py"), SKY_ALONE="1")


@nox.session
def together(session: nox.Session) -> None:
    """All packages in one environment: the tests that need more than one, and the rules of the house."""
    install(session, *(package.target("test") for package in PACKAGES), *group("notebooks"))
    pytest(session, "tests", "--ignore=tests/demo-plugin")


@nox.session
@nox.parametrize("plugin", ["template", "demonstration"], ids=["template", "demonstration"])
def contracts(session: nox.Session, plugin: str) -> None:
    """A third party's plugin passes the contract tests: the rendered template, and the demonstration package."""
    third_party = Package(ROOT / "tests" / "demo-plugin")
    if plugin == "template":
        third_party = Package(Path(session.create_tmp()).resolve() / "sky-my-plugin")
        session.run("rm", "-rf", str(third_party.path), external=True)
        session.run("python", "templates/render.py", str(third_party.path), "--name", "my-plugin")
    extras = [extra for extra in ("test",) if extra in third_party.extras]
    install(session, CORE.target("test"), third_party.target(*extras))
    pytest(session, str(third_party.path / "tests"))


@nox.session(python=PYTHONS[0])
@nox.parametrize("package", list(FIRST_PARTY), ids=list(FIRST_PARTY))
def minimums(session: nox.Session, package: str) -> None:
    """The oldest version of every declared dependency, on the oldest Python; torch stays where it is pinned."""
    needs = FIRST_PARTY[package].requirements("test")
    needs += [need for other in siblings(FIRST_PARTY[package], PACKAGES) for need in other.requirements()]
    floor = lowest(needs, apart={"torch", *FIRST_PARTY})
    constraints = Path(session.create_tmp()) / "minimums.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in floor.items()))
    install(session, "-c", str(constraints), *with_siblings(FIRST_PARTY[package], "test"))
    own_tests(session, FIRST_PARTY[package])


@nox.session(allow_parallel=False)
def notebooks(session: nox.Session) -> None:
    """Every notebook from a clean kernel in smoke mode, each within its minute: alone on the machine, all cores."""
    install(session, *(package.target("test") for package in PACKAGES), *group("notebooks"))
    cores = str(os.cpu_count() or 1)
    session.run("python", "tools/notebooks.py", "smoke", *session.posargs, env={"OMP_NUM_THREADS": cores})


@nox.session
def build(session: nox.Session) -> None:
    """Wheel and source distribution of every package install into an empty environment, import, and run."""
    session.install(*group("build"))
    work = Path(session.create_tmp()).resolve()
    session.run("rm", "-rf", str(work / "dist"), str(work / "empty"), external=True)
    for package in PACKAGES:
        session.run("python", "-m", "build", "--outdir", str(work / "dist"), str(package.path), silent=True)
    session.run("python", "-m", "venv", str(work / "empty"))
    python = str(work / "empty" / "bin" / "python")

    def run(*command: str) -> None:
        session.run(python, *command, external=True)

    run("-m", "pip", "install", "-qq", *torch_from(TORCH))
    for pattern in ("*.whl", "*.tar.gz"):
        built = sorted(map(str, (work / "dist").glob(pattern)))
        run("-m", "pip", "install", "-qq", f"torch=={TORCH}", *built)
        run("-m", "pip", "check")
        run("-c", "; ".join(f"import {package.module}" for package in PACKAGES))
        session.run(str(work / "empty" / "bin" / "sky"), "--help", external=True, silent=True)
        run("-m", "pip", "uninstall", "-qq", "-y", *sorted(FIRST_PARTY))
