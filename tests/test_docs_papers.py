"""docs/papers.md lists every part with a paper, at the file that holds it."""

from __future__ import annotations

import papers


def test_the_page_is_what_the_components_say() -> None:
    assert papers.PAGE.read_text(encoding="utf-8") == papers.page(), "stale: run python tools/papers.py"
