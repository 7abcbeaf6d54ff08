"""Every link in the documentation leads to a file that exists, and every page can be reached from the index."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from workspace import ROOT

DOCS = ROOT / "docs"


def pages() -> list[Path]:
    names = subprocess.check_output(["git", "ls-files", "-z", "*.md"], cwd=ROOT, text=True).split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).exists() and not name.startswith("templates/")]


def dead_links(page: Path) -> Iterator[str]:
    """Relative links of a Markdown page whose target does not exist."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
        path = target.partition("#")[0]
        if path and not re.match(r"[a-z]+:", path) and not (page.parent / path).exists():
            yield target


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert list(dead_links(page)) == []


def test_every_page_of_the_documentation_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^[\w/-]+$", index.split("```{toctree}")[1], re.MULTILINE))
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")} - {"index"} == listed


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[a](page.md#top) [b](gone.md) [c](https://example.org) `[d](code.md)` [e](#here) [f](x.md 'title')"
    )
    assert list(dead_links(page)) == ["gone.md", "x.md"]
