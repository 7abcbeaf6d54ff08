"""The test matrix: what it discovers, what it computes, and that its closing table cannot hide a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from matrix import affected, file_name, outcomes, table
from workspace import Package, lowest, packages, siblings


def test_minimums_are_the_lowest_versions_that_satisfy_everybody() -> None:
    needs = map(Requirement, ["numpy>=1.26", "NumPy>=2.0,<3", "rich~=13.7", "torch>=2.6", "click>=8.1.7"])
    assert lowest(needs, apart={"torch"}) == {"numpy": "2.0", "rich": "13.7", "click": "8.1.7"}


def test_a_requirement_without_a_lower_bound_has_no_minimum() -> None:
    with pytest.raises(ValueError, match="numpy<3 declares no lower bound"):
        lowest([Requirement("numpy<3")])


def test_packages_are_discovered_core_first_with_what_they_build_on(tmp_path: Path) -> None:
    for name, needs in {
        "sky-align": ["sky-peft>=0.1"],
        "sky-core": [],
        "sky-peft": ["sky-core>=0.1", "numpy>=2"],
    }.items():
        (tmp_path / "packages" / name).mkdir(parents=True)
        text = f'[project]\nname = "{name}"\nversion = "0.1.0"\ndependencies = {json.dumps(needs)}\n'
        (tmp_path / "packages" / name / "pyproject.toml").write_text(text)
    found = packages(tmp_path)
    assert [package.name for package in found] == ["sky-core", "sky-align", "sky-peft"]
    assert [other.name for other in siblings(found[1], found)] == ["sky-peft", "sky-core"]


def test_a_changelog_without_a_version_on_top_has_none(tmp_path: Path) -> None:
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 0.1.0\n")
    assert Package(tmp_path).released_version() is None


def recorded(tmp_path: Path, *sessions: tuple[str, str, str | None, str | None]) -> list[str]:
    """The lines of the closing table for sessions of (name, result, reason, JUnit test cases)."""
    entries = []
    for name, result, reason, cases in sessions:
        entries.append({"name": name, "signatures": [name], "result": result, "reason": reason, "duration": 1.0})
        if cases is not None:
            xml = f"<testsuites><testsuite>{cases}</testsuite></testsuites>"
            (tmp_path / f"{file_name(name)}.xml").write_text(xml)
    (tmp_path / "report.json").write_text(json.dumps({"sessions": entries}))
    return table(outcomes(tmp_path / "report.json", tmp_path), 60).splitlines()


PASS, FAIL, ERROR = "<testcase/>", "<testcase><failure/></testcase>", "<testcase><error/></testcase>"
SKIP = "<testcase><skipped message='no data'/></testcase>"


def test_the_last_line_sums_the_tests_of_every_session(tmp_path: Path) -> None:
    lines = recorded(
        tmp_path,
        ("lint", "success", None, None),
        ("tests-3.11(sky-core, torch-2.13.0)", "success", None, PASS * 3 + SKIP),
        ("together", "failed", None, PASS * 2 + FAIL + ERROR),
        ("tests-3.12(sky-core, torch-2.13.0)", "skipped", "no such interpreter", None),
    )
    assert lines[-1] == "5 passed, 2 failed, 1 skipped"
    assert any("1 skipped: no data" in line for line in lines)
    assert any(line.startswith("tests-3.12") and line.endswith("no such interpreter") for line in lines)


@pytest.mark.parametrize("cases", [None, PASS * 4], ids=["no tests", "tests that passed"])
def test_a_session_that_fails_outside_its_tests_counts_as_a_failure(tmp_path: Path, cases: str | None) -> None:
    passed = 4 if cases else 0
    assert recorded(tmp_path, ("docs", "failed", None, cases))[-1] == f"{passed} passed, 1 failed, 0 skipped"


def test_a_change_in_one_plugin_leaves_out_the_cells_of_the_others() -> None:
    names = ["lint", "tests-3.11(sky-core, torch-2)", "tests-3.11(sky-peft, torch-2)", "minimums(sky-attention)"]
    sessions = [{"session": name} for name in names]

    def left(*changed: str) -> list[str]:
        return [session["session"] for session in affected(sessions, list(changed))]

    assert left("packages/sky-peft/src/sky_peft/lora.py") == ["lint", "tests-3.11(sky-peft, torch-2)"]
    assert left("packages/sky-core/README.md") == names
    assert left("packages/sky-peft/README.md", "noxfile.py") == names
    assert left() == names
