"""What tests of runs share: a laboratory in an empty folder, and processes that can be killed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

SENTENCE = "the cat sat on the mat and the dog sat on the log; a cat and a dog, a mat and a log.\n"

CLOCK = {"time", "tokens_per_second", "seconds_per_step", "eta_seconds", "mfu", "wait"}
"""Metrics that no two runs share."""


@dataclass
class Told:
    """What a command left: its exit code, stdout, and on stderr the lines that are its errors."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("sky: ")]


class Lab:
    """A folder with a corpus and a run file of six steps, and short ways to run it and look at what is left."""

    def __init__(self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.table: dict[str, Any] = {
            "name": "tiny",
            "plugins": [],
            "model": {"n_layer": 1, "n_head": 2, "d_model": 16, "max_length": 16, "dropout": 0.1},
            "tokenizer": "byte",
            "data": {
                "kind": "text",
                "path": "corpus.txt",
                "sequence_length": 16,
                "split": "position",
                "cache": str(cache),
            },
            "train": {"steps": 6, "batch_tokens": 64, "precision": "fp32"},
            "optimizer": {"lr": 0.01},
            "eval": {"every": 2},
            "checkpoint": {"every": 2},
            "log": {"every": 1},
        }
        (folder / "corpus.txt").write_text(SENTENCE * 40)
        self.write()

    def write(self, **tables: Any) -> None:
        """run.yaml, with these tables laid over those of the laboratory."""
        from sky_core.config import merge
        from sky_core.yaml_file import dump_yaml

        Path("run.yaml").write_text(dump_yaml(merge(self.table, tables)))

    def train(self, *overrides: str) -> Any:
        from sky_core import api

        return api.train("run.yaml", overrides)

    def resume(self, source: str | Path, *overrides: str) -> Any:
        from sky_core import api

        return api.resume(source, overrides)

    def during(self, step: int, act: Callable[[Any], None]) -> Any:
        """Inside, `act(trainer)` is called at the end of each training step of that number."""
        from sky_core.training.trainer import Trainer

        original = Trainer._train_step

        def acting(trainer: Any, *given: Any) -> Any:
            metrics = original(trainer, *given)
            if trainer.step == step:
                act(trainer)
            return metrics

        patched = self.monkeypatch.context()
        context = patched.__enter__()
        context.setattr(Trainer, "_train_step", acting)
        return _Undo(patched)

    def sky(self, *arguments: str | Path) -> Told:
        """The command line, in this process."""
        from sky_core.cli.main import main

        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return Told(end.value.code or 0, out, err)

    @staticmethod
    def steps(folder: Path) -> list[int]:
        """The steps of the checkpoints that a run keeps."""
        return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*"))

    @staticmethod
    def info(folder: Path) -> dict[str, Any]:
        return json.loads((folder / "run.json").read_text())  # type: ignore[no-any-return]

    @staticmethod
    def metrics(folder: Path) -> list[dict[str, Any]]:
        """The metric lines of a run, without what a clock says."""
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]

    @staticmethod
    def tensors(folder: Path, which: str = "last") -> dict[str, bytes]:
        """Every tensor file of a checkpoint, as bytes."""
        checkpoint = folder / "checkpoints" / which
        return {
            str(path.relative_to(checkpoint)): path.read_bytes() for path in sorted(checkpoint.rglob("*.safetensors"))
        }


class _Undo:
    def __init__(self, context: Any) -> None:
        self.context = context

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: Any) -> None:
        self.context.__exit__(*exception)


@pytest.fixture(scope="session")
def prepared_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where prepared corpora are kept for the whole session."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def lab(
    sky_sandbox: Path, prepared_text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Lab]:
    import sky_core.training.report

    monkeypatch.setattr(sky_core.training.report, "measure_peak_flops", lambda device, precision: 1e9)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Lab(sky_sandbox, prepared_text, monkeypatch, capsys)
    root.handlers[:], root.level = handlers, level


@pytest.fixture(scope="session")
def forks() -> Any:
    """Processes that start in milliseconds: forked from one that has torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sky_core.api", "torch._dynamo"])
    return context


@pytest.fixture
def started(forks: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., BaseProcess]]:
    """started("train", "run.yaml"): the `sky` command in a process of its own, which does not outlive the test."""
    from sky_core.cli.main import main

    processes: list[BaseProcess] = []

    def start(*arguments: str | Path) -> BaseProcess:
        process = forks.Process(target=main, args=([str(argument) for argument in arguments],))
        process.start()
        processes.append(process)
        return process  # type: ignore[no-any-return]

    yield start
    for process in processes:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What `condition` gives once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


@pytest.fixture(name="wait_for")
def _wait_for() -> Callable[..., Any]:
    return wait_for


os.environ.setdefault("OMP_NUM_THREADS", "1")
