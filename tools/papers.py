"""Paper to file: which source each part follows, and where its code is. `python tools/papers.py` writes docs/papers.md.

Needs the packages installed; imports no torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from sky_core.cli.implementation import implementation
from sky_core.plugins import load_plugins

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "papers.md"
HEAD = """\
# Papers

Every part that follows a paper, and the file that does. The file begins with the equations and says where it differs.
This page is made by `python tools/papers.py`.

| slot | kind | source | code |
|---|---|---|---|
"""


def page() -> str:
    """docs/papers.md as it should be."""
    rows = []
    for slot, kinds in load_plugins().catalog.items():
        for kind, component in kinds.items():
            if component.paper:
                file = _source(implementation(component)[1])
                rows.append(f"| {slot} | `{kind}` | {_linked(component.paper)} | [{file.name}](../{file}) |\n")
    return HEAD + "".join(rows)


def _source(file: Path) -> Path:
    """The repository's own copy of a module's file, wherever the package is installed."""
    tails = ("/".join(file.parts[start:]) for start in range(1, len(file.parts)))
    return next(found for tail in tails for found in sorted(ROOT.glob(f"packages/*/src/{tail}"))).relative_to(ROOT)


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
