"""The contracts can fail: each of the broken parts is found by the standard test that is there for it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import sky_core.testing as kit

BROKEN = Path(__file__).with_name("broken_parts.py")
SOURCE = BROKEN.read_text(encoding="utf-8")
FAULTS = dict(re.findall(r"^class (Test\w+)\(\w+Contract\):.*?finds = \"(.+?)\"$", SOURCE, re.M | re.S))


def test_every_fault_is_found() -> None:
    nodes = [f"{BROKEN}::{name}::{test}" for name, test in FAULTS.items()]
    options = ["-q", "--tb=no", "-rA", "-p", "no:cacheprovider", "--import-mode=importlib", "-o", "python_files=*.py"]
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(BROKEN.parent), *options, *nodes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    failed = set(re.findall(r"^FAILED \S+?::(Test\w+)::", done.stdout, re.M))
    assert failed == set(FAULTS), (
        f"not found: {sorted(set(FAULTS) - failed)}\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
    )


def test_every_contract_has_a_fault_to_find() -> None:
    broken = set(re.findall(r"^class Test\w+\((\w+Contract)\):", SOURCE, re.M))
    assert broken == set(kit.__all__)
