"""Run the test matrix and close with a table: session, result, time, counts of tests.

    python tools/matrix.py [NOX OPTIONS]         run (by default every session that can run here), two side by side
    python tools/matrix.py --list [BASE]         the sessions as JSON for a workflow; with BASE, a git revision, only
                                                 those that the files changed since BASE can affect

The last line is `N passed, N failed, N skipped`, summed over the pytest runs; a session that failed in another way
counts as one failure. The exit code is 1 unless nothing failed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".nox"
NOX = [sys.executable, "-m", "nox", "-f", str(ROOT / "noxfile.py")]


def file_name(session: str) -> str:
    """The file name under which the noxfile leaves a session's test report, without its suffix."""
    return re.sub(r"[^\w.]+", "-", session).strip("-")


@dataclass
class Outcome:
    """What one session came to. `tests` counts passed, failed and skipped; `reasons` says why tests were skipped."""

    name: str
    result: str
    seconds: float
    reason: str = ""
    tests: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def read_tests(self, report: Path) -> None:
        """Add the counts of a JUnit report, where the session wrote one."""
        if not report.exists():
            return
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag: child for child in case if child.tag in ("failure", "error", "skipped")}
            skipped = kinds.get("skipped")
            if "failure" in kinds or "error" in kinds:
                self.tests["failed"] += 1
            elif skipped is not None:
                self.tests["skipped"] += 1
                self.reasons[skipped.get("message") or "no reason given"] += 1
            else:
                self.tests["passed"] += 1
        if self.result == "failed" and not self.tests["failed"]:
            self.tests["failed"] += 1


def outcomes(report: Path, reports: Path) -> list[Outcome]:
    """What nox recorded, with the counts of the tests of each session."""
    found = []
    for entry in json.loads(report.read_text(encoding="utf-8"))["sessions"]:
        for name in entry["signatures"][:1] or [entry["name"]]:
            result = {"success": "passed", "aborted": "failed"}.get(entry["result"], entry["result"])
            outcome = Outcome(name, result, entry["duration"], entry["reason"] or "")
            outcome.read_tests(reports / f"{file_name(name)}.xml")
            if result == "failed" and not outcome.tests:
                outcome.tests["failed"] = 1
            found.append(outcome)
    return found


def table(found: Iterable[Outcome], seconds: float) -> str:
    """The report as plain text; the last line holds the sums."""
    found = list(found)
    width = max([len("session"), *(len(outcome.name) for outcome in found)])
    lines = ["", f"{'session':<{width}}  result     time  passed failed skipped"]
    total: Counter[str] = Counter()
    why: Counter[str] = Counter()
    for outcome in found:
        counts = [
            f"{outcome.tests[kind] or '':>{size}}" for kind, size in (("passed", 6), ("failed", 6), ("skipped", 7))
        ]
        note = f"  {outcome.reason}" if outcome.result == "skipped" else ""
        row = f"{outcome.name:<{width}}  {outcome.result:<7} {outcome.seconds:>5.0f} s  {' '.join(counts)}{note}"
        lines.append(row.rstrip())
        total += outcome.tests
        why += outcome.reasons
    lines += ["", *(f"{count:>4} skipped: {reason}" for reason, count in why.most_common())]
    lines.append(f"the matrix took {seconds / 60:.1f} minutes")
    lines.append(", ".join(f"{total[kind]} {kind}" for kind in ("passed", "failed", "skipped")))
    return "\n".join(lines)


def run(options: list[str]) -> int:
    report, reports = WORK / "report.json", WORK / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    report.unlink(missing_ok=True)
    start = time.monotonic()
    code = subprocess.call([*NOX, "--parallel", "2", "--allow-parallel", "--report", str(report), *options], cwd=ROOT)
    try:
        found = outcomes(report, reports)
    except (FileNotFoundError, json.JSONDecodeError):  # nox itself went down
        print(f"nox stopped with exit code {code} before it had a report\n0 passed, 1 failed")
        return 1
    print(table(found, time.monotonic() - start), flush=True)
    return int(code != 0 or not found or any(outcome.tests["failed"] for outcome in found))


def affected(sessions: list[dict[str, str]], changed: list[str]) -> list[dict[str, str]]:
    """Leave out the cells of packages that no changed file can reach.

    A change in one plugin cannot alter another plugin (no plugin imports another); a change anywhere else can.
    """
    touched = {match[1] for path in changed if (match := re.match(r"packages/([^/]+)/", path))}
    if not changed or "sky-core" in touched or any(not path.startswith("packages/") for path in changed):
        return sessions
    mine = re.compile(r"\((" + "|".join(map(re.escape, sorted(touched))) + r")\b")
    return [session for session in sessions if "(sky-" not in session["session"] or mine.search(session["session"])]


def listed(base: str | None) -> str:
    """The sessions as JSON: `[{"session": ..., "python": ...}, ...]`."""
    text = subprocess.check_output([*NOX, "--list-sessions", "--json"], cwd=ROOT, text=True)
    sessions = [{"session": each["session"], "python": each["python"] or "3.11"} for each in json.loads(text)]
    if base:
        git = ["git", "diff", "--name-only", f"{base}...HEAD"]
        sessions = affected(sessions, subprocess.check_output(git, cwd=ROOT, text=True).split())
    return json.dumps(sessions)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--list"]:
        print(listed(next(iter(arguments[1:]), None)))
    else:
        sys.exit(run(arguments))
