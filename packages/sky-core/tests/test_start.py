"""What a run does not wait for before its first step: the compiler, the garbage collector, a measurement."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sky_core.cli.uncollected import uncollected
from sky_core.files import read_json_lines

RUN = """\
plugins: []
model: {n_layer: 1, n_head: 2, d_model: 16, max_length: 16}
tokenizer: char
data: {kind: text, path: text.txt, sequence_length: 16, split: position, cache: cache}
train: {steps: 2, batch_tokens: 32, precision: fp32}
eval: {every: 1}
sample: {every: 1, prompts: [a], max_new_tokens: 2}
"""

UNUSED = ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "sympy", "transformers", "matplotlib")
"""Slow to import, and nothing to a run that compiles nothing."""

OPTIMIZERS = ["adamw", "optimizer={kind: adamw, fused: false}", "muon"]


def test_a_run_that_compiles_nothing_imports_no_compiler_and_sets_what_it_imports_aside(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a cat and a dog. " * 200)
    (tmp_path / "run.yaml").write_text(RUN)
    code = (
        "import gc, sys\nfrom sky_core.cli.main import main\n"
        f"for optimizer in {OPTIMIZERS}:\n"
        "    try: main(['train', 'run.yaml', optimizer if '=' in optimizer else f'optimizer={optimizer}'])\n"
        "    except SystemExit as end: assert end.code == 0, end.code\n"
        f"    imported = [name for name in {UNUSED} if name in sys.modules]\n"
        "    assert not imported, f'{optimizer} imported {imported}'\n"
        "assert gc.isenabled()\n"
        "assert gc.get_freeze_count() > len(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"SKY_PLUGINS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the collector was on, each time that all objects were set aside, in a process without torch."""
    calls: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(gc.isenabled()))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return calls


def test_the_collector_rests_while_importing_and_is_back_after_an_error(frozen: list[bool]) -> None:
    @uncollected()
    def broken() -> None:
        assert not gc.isenabled()
        raise ImportError("no torch")

    with pytest.raises(ImportError, match="no torch"):
        broken()
    assert gc.isenabled()
    assert frozen == [False]


@pytest.mark.parametrize("why", ["torch is there", "the collector is off"])
def test_a_process_of_ones_own_keeps_its_garbage_collector(
    frozen: list[bool], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "torch is there":
        monkeypatch.setitem(sys.modules, "torch", sys)
    else:
        monkeypatch.setattr(gc, "isenabled", lambda: False)
    before = gc.isenabled()
    with uncollected():
        assert gc.isenabled() == before
    assert gc.isenabled() == before
    assert frozen == []


def test_the_first_step_waits_for_no_measurement_of_the_machine(lab: Any) -> None:
    logged: list[list[int]] = []

    def peak(device: Any, precision: str) -> float:
        (run,) = Path("runs").iterdir()
        logged.append([line["step"] for line in read_json_lines(run / "metrics.jsonl")])
        return 1e9

    lab.monkeypatch.setattr("sky_core.training.report.measure_peak_flops", peak)
    run = lab.train("log.every=1", "eval.every=null").directory
    assert logged == [[1]]
    steps = [line for line in read_json_lines(run / "metrics.jsonl") if "loss" in line]
    assert ["mfu" in line for line in steps] == [line["step"] > 1 for line in steps]
