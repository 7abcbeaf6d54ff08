"""The benchmarks run, their records say where numbers come from, and the pages show what the records hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sky_core.errors import SkyError, UserError
from workspace import ROOT

FOLDER = ROOT / "benchmarks"
SCRIPTS = [
    "nano_parity",
    "nanogpt_cpu",
    "nanogpt_gpu",
    "kill_resume",
    "cli_startup",
    "mup_transfer",
    "shakespeare",
    "shakespeare_ablation",
]
ON_TEXT = {"nanogpt_cpu", "nanogpt_gpu", "kill_resume", "mup_transfer", "shakespeare", "shakespeare_ablation"}
ORIGIN = {
    "name",
    "what",
    "command",
    "machine",
    "versions",
    "commit",
    "dirty",
    "changed_files",
    "date",
    "seeds",
    "smoke",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A play of twenty thousand characters."""
    path = tmp_path_factory.mktemp("corpus") / "play.txt"
    lines = [f"ROMEO:\nNight {i % 97} is {i % 13} times as long as day {i % 7}, my lord.\n\n" for i in range(400)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The scripts, importable as they import each other."""
    monkeypatch.syspath_prepend(FOLDER)
    import table

    yield ModuleType("benchmarks")
    assert Path(table.__file__).parent == FOLDER


def test_the_ablation_ends_in_the_recipe(benchmarks: ModuleType) -> None:
    import shakespeare_ablation

    from sky_core.config import read_run

    ladder = [one for one in shakespeare_ablation.entries() if one["list"] == "ladder"]
    end = read_run(ROOT / "recipes" / "nanogpt_cpu.yaml", ladder[-1]["overrides"]).as_dict()
    recipe = read_run(ROOT / "recipes" / "shakespeare.yaml", ["train.precision=bf16"]).as_dict()
    assert {key: end[key] for key in end if recipe[key] != end[key]}.keys() <= {"name", "eval", "checkpoint", "sample"}


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def measured(name: str, **more: Any) -> dict[str, Any]:
    """A record as `Record.save` writes it."""
    measures = [
        {
            "what": "loss",
            "unit": "nats",
            "value": 1.8951,
            "low": 1.89,
            "high": 1.9,
            "n": 3,
            "at_most": 1.9,
            "met": True,
        },
        {"what": "speed", "unit": "tokens/s", "value": 12345.6, "low": 12345.6, "high": 12345.6, "n": 1},
        {"what": "tokens", "unit": "", "value": 3, "low": 3, "high": 3, "n": 1, "at_least": 5, "met": False}
        | {"peer": {"name": "them", "value": 4}},
    ]
    machine = {"cpu": "A CPU", "cores": 2}
    return {
        "name": name, "what": f"what {name} is", "command": f"python benchmarks/{name}.py", "machine": machine,
        "versions": {"python": "3.11.7", "torch": "2.13.0"}, "commit": "0123456789abcdef", "dirty": False,
        "date": "2026-01-02T03:04:05Z", "measures": measures, **more,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_goes_through_everything_in_smoke_mode(script: str, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run(script, "--smoke", "--out", out, *(["--data", corpus] if script in ON_TEXT else []))
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data.keys() >= ORIGIN
    assert data["name"] == script
    assert data["smoke"] is True
    assert data["machine"]["cpu"]
    assert data["versions"]["sky-core"]
    assert all({"what", "unit", "value", "low", "high", "n"} <= measure.keys() for measure in data["measures"])
    assert str(ROOT) not in data["command"]
    assert data["runs"]
    if script in {"nano_parity", "kill_resume"}:  # what they check does not depend on size or speed
        assert [measure for measure in data["measures"] if measure.get("met") is False] == []
    if script == "kill_resume":
        assert len(data["kills"]) == 1
    if script == "nanogpt_cpu":
        (evaluated,) = (run["curve"][-1]["loss"] for run in data["runs"])
        # The same windows but for a last one that is cut off: a few dozen of two thousand characters.
        assert data["runs"][0]["windows"] == pytest.approx(evaluated, rel=0.02)
        assert data["runs"][0]["sky_eval"] == pytest.approx(evaluated, abs=1e-6)


def test_a_smoke_run_is_never_recorded_among_the_results() -> None:
    refused = run("cli_startup", "--smoke", "--out", FOLDER / "results" / "cli_startup.json")
    assert refused.returncode == 1
    assert "measures nothing" in refused.stderr


def test_every_script_is_described_and_tested() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"table", "plot"}
    assert scripts == set(SCRIPTS)
    assert [name for name in scripts if f"[`{name}.py`]({name}.py)" not in page] == []


# ------------------------------------------------------------------------------------- kill and resume can fail


@pytest.fixture
def finished(benchmarks: ModuleType, corpus: Path, tmp_path: Path) -> tuple[Any, Any]:
    """A finished run of kill_resume's model, and a copy of it."""
    import kill_resume

    import sky_core

    run = kill_resume.run_file(corpus, 6, 2, tmp_path) | {"out": str(tmp_path / "runs")}
    sky_core.train(run)
    shutil.copytree(tmp_path / "runs", tmp_path / "copy", symlinks=True)
    return kill_resume.found(tmp_path / "runs"), kill_resume.found(tmp_path / "copy")


def test_a_run_is_like_its_copy_until_a_bit_differs(finished: tuple[Any, Any]) -> None:
    import kill_resume
    import torch
    from safetensors.torch import load_file, save_file

    original, copy = finished
    alike = kill_resume.compared(copy, original)
    assert not any(alike["differing_tensors"].values())
    assert alike["differing_metric_lines"] == 0
    assert alike["leftovers"] == []
    assert kill_resume.faults(copy) == (3, [])
    assert kill_resume.last_step(copy) == 6

    weights = copy.path / "checkpoints" / "last" / "model.safetensors"
    tensors = load_file(weights)
    name = min(tensors)
    tensors[name].view(torch.int32)[(0,) * tensors[name].ndim] ^= 1
    save_file(tensors, weights)
    metrics = copy.path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": ', '"loss": 1', 1))
    differing = kill_resume.compared(copy, original)
    assert differing["differing_tensors"] == {"model": [name], "training/ema": [], "training/optimizer": []}
    assert differing["differing_metric_lines"] > 0
    (fault,) = kill_resume.faults(copy)[1]
    assert "model.safetensors" in fault


def test_a_kill_is_told_by_what_it_left_behind(finished: tuple[Any, Any]) -> None:
    import kill_resume

    directory, _ = finished
    checkpoints, pid = directory.path / "checkpoints", directory.info["pid"]
    assert kill_resume.phase(None, pid) == "start-up"
    assert kill_resume.phase(directory, pid + 1) == "start-up"
    assert kill_resume.phase(directory, pid) == "step"
    events = (directory.path / "events.jsonl").read_text().splitlines(keepends=True)
    (directory.path / "events.jsonl").write_text("".join(line for line in events if '"eval"' not in line))
    assert kill_resume.phase(directory, pid) == "evaluation"
    (checkpoints / ".tmp-step_000008").mkdir()
    assert kill_resume.phase(directory, pid) == "save"
    (checkpoints / "last").unlink()
    (checkpoints / "last").symlink_to("step_000008")
    assert any("no complete checkpoint" in fault for fault in kill_resume.faults(directory)[1])


@pytest.mark.parametrize(("startup", "training", "kills"), [(3.0, 40.0, 50), (10.0, 20.0, 50), (1.0, 300.0, 200)])
def test_the_window_leaves_the_asked_part_of_a_run_done(
    benchmarks: ModuleType, startup: float, training: float, kills: int
) -> None:
    import kill_resume

    window = kill_resume.window(startup, training, kills, 0.5)
    assert kills * window**2 / (2 * (startup + window)) == pytest.approx(0.5 * training)


def test_the_window_is_never_longer_than_a_run(benchmarks: ModuleType) -> None:
    import kill_resume

    assert kill_resume.window(10.0, 1.0, 1, 0.9) == 1.0


# ---------------------------------------------------------------------------------------------- the record


def options(**more: Any) -> Any:
    import argparse

    return argparse.Namespace(**{"name": "x", "out": None, "smoke": False, "allow_dirty": False, **more})


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `record` takes for the state of the repository; change it at will."""
    from sky_core.bench import record

    state = {"commit": "c0ffee", "dirty": False, "changed_files": []}
    monkeypatch.setattr(record, "source_state", lambda: dict(state))
    return state


def test_a_measure_is_a_median_held_to_its_target(source: dict[str, Any], tmp_path: Path) -> None:
    from sky_core.bench.record import Record

    record = Record(options(out=tmp_path / "x.json"), what="x", seeds=[1, 2, 3])
    record.measure("loss", [1.95, 1.85, 1.88], "nats", at_most=1.9, peer=("them", 1.9))
    record.measure("speed", [3, 4], "tokens/s", at_least=4)
    record.save(runs=[1])
    data = json.loads((tmp_path / "x.json").read_text())
    loss, speed = data["measures"]
    assert (loss["value"], loss["low"], loss["high"], loss["n"], loss["met"]) == (1.88, 1.85, 1.95, 3, True)
    assert (speed["value"], speed["at_least"], speed["met"]) == (3.5, 4, False)
    assert (data["commit"], data["dirty"], data["seeds"]) == ("c0ffee", False, [1, 2, 3])


def test_a_dirty_tree_is_refused_before_anything_is_measured(source: dict[str, Any], tmp_path: Path) -> None:
    from sky_core.bench.record import Record

    source |= {"dirty": True, "changed_files": ["a.py"]}
    with pytest.raises(UserError, match=r"a\.py.*--allow-dirty"):
        Record(options(out=tmp_path / "x.json"), what="x")
    record = Record(options(out=tmp_path / "x.json", allow_dirty=True), what="x")
    record.save(runs=[])
    data = json.loads((tmp_path / "x.json").read_text())
    assert (data["dirty"], data["changed_files"]) == (True, ["a.py"])


def test_a_tree_that_changes_while_it_is_measured_gives_no_result(
    source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sky_core.bench import record

    (tmp_path / "aside").mkdir()
    monkeypatch.setattr(record.tempfile, "gettempdir", lambda: str(tmp_path / "aside"))
    measuring = record.Record(options(out=tmp_path / "x.json"), what="x")
    source |= {"commit": "decaf"}
    with pytest.raises(SkyError, match="changed while it was measured"):
        measuring.save(runs=[])
    assert not (tmp_path / "x.json").exists()
    aside = json.loads((tmp_path / "aside" / "x.json").read_text())
    assert (aside["commit"], aside["commit_at_end"], aside["dirty"]) == ("c0ffee", "decaf", True)


def test_the_state_of_the_source_leaves_results_out(tmp_path: Path) -> None:
    from sky_core.bench.record import source_state

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a.py").write_text("1\n")
    git("add", ".")
    git("commit", "-m", "a")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "x.json").write_text("{}")
    assert source_state(tmp_path)["dirty"] is False
    (tmp_path / "new.py").write_text("2\n")
    assert source_state(tmp_path)["changed_files"] == ["new.py"]


# ----------------------------------------------------------------------------------------------- the table


def test_the_pages_show_the_results(benchmarks: ModuleType) -> None:
    import table

    pages = [str(page.relative_to(ROOT)) for page, _ in table.stale()]
    assert pages == [], "run: python benchmarks/table.py"


def test_a_stale_page_is_found_and_renewed(benchmarks: ModuleType, tmp_path: Path) -> None:
    import table

    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    marks = "before\n<!-- results -->\n<!-- /results -->\nafter\n"
    for name in table.PAGES:
        (tmp_path / name).write_text(marks)
    assert list(table.stale(tmp_path)) == []
    (folder / "x.json").write_text(json.dumps(measured("x")))
    for page, text in table.stale(tmp_path):
        page.write_text(text)
    assert list(table.stale(tmp_path)) == []
    inner, top = ((tmp_path / name).read_text() for name in table.PAGES)
    assert "| loss | 1.895 nats | 1.89 to 1.9 (n = 3) | ≤ 1.9 | met |  |" in inner
    assert "| tokens | 3 |  | ≥ 5 | **not met** | them: 4 |" in inner
    assert "(results/x.json)" in inner
    assert "(benchmarks/results/x.json)" in top
    assert "12,346 tokens/s" in inner
    assert "12,346" not in top
    assert inner.startswith("before\n")
    assert inner.endswith("after\n")
    (folder / "x.json").write_text(json.dumps(measured("x", dirty=True)))
    assert len(list(table.stale(tmp_path))) == 2


def test_results_of_changed_sources_say_so(benchmarks: ModuleType) -> None:
    import table

    assert "uncommitted" not in table.table([measured("x")], "results", every=True)
    assert "uncommitted changes" in table.table([measured("x", dirty=True)], "results", every=True)


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_result_is_complete_and_no_smoke_run(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data.keys() >= ORIGIN
    assert data["name"] == path.stem
    assert data["smoke"] is False
    assert data["commit"]


# ------------------------------------------------------------------------------------------------ the plot


def test_a_curve_becomes_a_picture_and_the_same_one_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the curves")
    curve = [{"step": step, "loss": 4 - step / 100, "bits_per_byte": 5.0} for step in (0, 100, 200)]
    peer = {"name": "them", "curve_of": "their loss", "curve": [[0, 4.1], [200, 2.1]]}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(measured("x", runs=[{"seed": 1, "curve": curve}], peers=[peer])))
    pictures = []
    for _ in range(2):
        done = run("plot", path)
        assert done.returncode == 0, done.stderr
        pictures.append(path.with_suffix(".svg").read_bytes())
    assert pictures[0] == pictures[1]
    assert run("plot", path, "--format", "png").returncode == 0
    assert path.with_suffix(".png").stat().st_size > 5000


def test_results_without_a_curve_are_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the curves")
    path = tmp_path / "x.json"
    path.write_text(json.dumps(measured("x", runs=[{"seed": 1}])))
    assert "no curve" in run("plot", path).stdout
    assert os.listdir(tmp_path) == ["x.json"]
