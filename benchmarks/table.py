"""Write the results into the pages that show them, between `<!-- results -->` and `<!-- /results -->`.

    python benchmarks/table.py            rewrite the pages
    python benchmarks/table.py --check    exit with 1 when a page does not show what results/*.json say

benchmarks/README.md shows every measure, the README at the top those that have a target or a peer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sky_core.bench.report import HEAD, origin, row
from sky_core.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

PAGES = {"benchmarks/README.md": True, "README.md": False}
"""Page -> whether it shows every measure."""

BETWEEN = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)


def results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def table(records: list[dict[str, Any]], folder: str, *, every: bool) -> str:
    """The records as a Markdown table with a line on the origin of each; `folder` is where the page finds them."""
    if not records:
        return ""
    rows = [*HEAD]
    for record in records:
        measures = [m for m in record["measures"] if every or "met" in m or "peer" in m]
        if measures:
            rows.append(f"| **{record['what']}** ([{record['name']}]({folder}/{record['name']}.json)) | | | | | |")
        rows += map(row, measures)
    return "\n".join(
        [*rows, "", "Where the numbers come from:", "", *(f"- {origin(record)}" for record in records), ""]
    )


def stale(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """The pages that do not show the results, and what they would be. Raises ValueError for one without the marks."""
    folder = root / "benchmarks" / "results"
    for name, every in PAGES.items():
        page = root / name
        text = page.read_text(encoding="utf-8")
        if not BETWEEN.search(text):
            raise ValueError(f"{name}: it has no lines <!-- results --> and <!-- /results -->")
        link = Path(os.path.relpath(folder, page.parent)).as_posix()
        shows = table(results(folder), link, every=every)
        renewed = BETWEEN.sub(lambda _, shows=shows: shows, text)
        if renewed != text:
            yield page, renewed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when a page is stale")
    options = parser.parse_args()
    pages = list(stale())
    for page, text in pages:
        print(f"{page.relative_to(ROOT)} {'is stale; run: python benchmarks/table.py' if options.check else 'written'}")
        if not options.check:
            write_atomic(page, text)
    raise SystemExit(bool(pages) and options.check)


if __name__ == "__main__":
    main()
