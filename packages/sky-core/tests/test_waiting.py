"""What a training step waits for: the device once, the data hardly ever."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sky_core.data.dataset import IGNORE, Batch
from sky_core.data.loader import Loader
from sky_core.run_directory import RunDirectory
from sky_core.testing.workbench import TinyDataset, tiny_run, tiny_tokenizer
from sky_core.training.trainer import Trainer


class Waits(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors, which is when it waits for a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        for name in ("tolist", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, self._counting(name, getattr(torch.Tensor, name)))

    def _counting(self, name: str, original: Any) -> Any:
        def counting(*given: Any) -> Any:
            self.counted[name] += threading.current_thread() is threading.main_thread()
            return original(*given)

        return counting

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        if operation._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.counted[operation._schema.name] += 1
        return operation(*inputs, **(options or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("feedforward", ["swiglu", {"kind": "moe", "n_experts": 4, "d_ff": 16, "aux_loss": 0.1}])
def test_the_host_waits_once_a_step_between_two_log_lines(lab: Any, optimizer: str, feedforward: Any) -> None:
    run = tiny_run(
        out="runs",
        optimizer=optimizer,
        model={"n_layer": 2, "n_head": 2, "d_model": 16, "max_length": 16, "feedforward": feedforward},
        train={"steps": 9, "batch_tokens": 64, "micro_batch": 2, "precision": "fp32", "dry_run": False},
        log={"every": 100},
    )
    trainer = run.train.build(run, RunDirectory.create(run, config_input=""))
    waits, seen, there = Waits(lab.monkeypatch), [], {}
    original, on_step, count, to = Trainer._train_step, trainer.report.on_step, Batch.n_targets, Batch.to

    def moved(batch: Batch, device: Any) -> Batch:
        """As if to another device: what is counted there is waited for, what is counted here is not."""
        other = to(batch._map(torch.clone), device)
        there[other.targets_BT.data_ptr()] = other  # kept, so that no other tensor comes to lie there
        return other

    def counted(batch: Batch) -> int:
        with nullcontext() if batch.targets_BT.data_ptr() in there else _disable_current_modes():
            return count(batch)

    def step(trainer: Trainer, batch: Batch) -> dict[str, Any]:
        waits.counted.clear()
        with waits:
            return original(trainer, batch)

    def report(number: int, metrics: dict[str, Any]) -> None:
        with waits:
            on_step(number, metrics)
        seen.append({name: times for name, times in waits.counted.items() if times})

    lab.monkeypatch.setattr(Batch, "to", moved)
    lab.monkeypatch.setattr(Batch, "n_targets", counted)
    lab.monkeypatch.setattr(Trainer, "_train_step", step)
    lab.monkeypatch.setattr(trainer.report, "on_step", report)
    trainer.train()
    assert seen[1:-1] == [{"aten::_local_scalar_dense": 1}] * 7


def test_a_batch_on_its_way_to_the_device_keeps_its_count() -> None:
    batch = TinyDataset(tiny_tokenizer()).batch(0, 4)
    batch.targets_BT[1, 3:9] = IGNORE
    moved = batch.to("meta")  # where nothing can be counted
    assert moved.n_targets() == batch.n_targets() == 4 * 15 - 6
    assert batch.to("cpu").rows(1, 2).n_targets() == 15 - 6


class Slow(TinyDataset):
    def batch(self, start: int, count: int) -> Batch:
        time.sleep(0.02)
        return super().batch(start, count)


def test_the_loader_waits_only_where_reading_is_slower_than_training() -> None:
    def waited(seconds_of_a_step: float) -> float:
        with Loader(Slow(tiny_tokenizer()), 0, 2) as loader:
            next(loader)
            before = loader.waited
            for _ in range(5):
                time.sleep(seconds_of_a_step)
                next(loader)
            return loader.waited - before

    assert waited(0.0) > 0.05  # five batches of 0.02 s, two of them read ahead
    assert waited(0.1) < 0.05


def test_batches_for_a_gpu_are_pinned_by_the_thread_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    dataset = TinyDataset(tiny_tokenizer())
    with Loader(dataset, 0, 2) as loader:
        next(loader)
    assert not pinned
    with Loader(dataset, 0, 2, pinned=True) as loader:
        assert torch.equal(next(loader).tokens_BT, dataset.batch(0, 2).tokens_BT)
    assert len(pinned) >= 2


def test_the_share_of_waiting_is_a_metric(lab: Any) -> None:
    run = lab.train().directory
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert all('"wait": ' in line for line in lines)
