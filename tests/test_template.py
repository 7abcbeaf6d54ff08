"""The plugin template renders into a package whose own tests pass and that `sky plugins` finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workspace import ROOT

RENDER = ROOT / "templates" / "render.py"


def run(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def render(destination: Path, name: str) -> subprocess.CompletedProcess[str]:
    return run([str(RENDER), str(destination), "--name", name])


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered") / "sky-night-owl"
    done = render(folder, "night-owl")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def environment(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The rendered package as if installed: its sources and its metadata on the path."""
    site = tmp_path_factory.mktemp("site")
    info = site / "sky_night_owl-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sky-night-owl\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[sky]\nnight-owl = sky_night_owl.plugin\n")
    return os.environ | {"PYTHONPATH": f"{plugin / 'src'}{os.pathsep}{site}", "SKY_PLUGINS": "night-owl"}


def test_no_placeholder_is_left(plugin: Path) -> None:
    for file in plugin.rglob("*"):
        words = str(file) + (file.read_text(encoding="utf-8") if file.is_file() else "")
        assert not any(word in words for word in ("__NAME__", "__MODULE__", "__DIST__", "__KIND__")), file


def test_its_contract_tests_pass(plugin: Path, environment: dict[str, str]) -> None:
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(plugin), str(plugin)], environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_sky_lists_it(environment: dict[str, str]) -> None:
    done = run(["-m", "sky_core", "plugins", "--json"], environment)
    assert done.returncode == 0, done.stderr
    assert '"night-owl"' in done.stdout
    assert '"night_owl"' in done.stdout


@pytest.mark.parametrize("name", ["My Plugin", "9lives", "owl_", "sky-", "../owl"])
def test_a_name_that_cannot_be_a_package_is_refused(tmp_path: Path, name: str) -> None:
    done = render(tmp_path / "new", name)
    assert done.returncode == 2
    assert "a name is lower-case words" in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    done = render(tmp_path, "owl")
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
