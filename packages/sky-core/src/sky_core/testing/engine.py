"""The contracts of engines (a step is a step wherever it runs), trainers (loops) and callbacks (observers).

They run in one process. An engine for several is held to the same contract by its package, in a process group of one.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sky_core.data.dataset import Batch
from sky_core.errors import CheckpointError
from sky_core.run_directory import RunDirectory
from sky_core.slots import Callback, Engine, Trainer
from sky_core.testing.component import ComponentContract
from sky_core.testing.workbench import (
    TinyDataset,
    assert_close,
    assert_same_weights,
    component,
    tiny_model,
    tiny_run,
    tiny_tokenizer,
    weights,
)
from sky_core.training.engine import Engine as BuiltEngine
from sky_core.training.engine import Step
from sky_core.training.trainer import EVENTS

ARGUMENTS = {
    "on_start": (),
    "on_step": ("step", "metrics"),
    "on_eval": ("step", "results"),
    "on_save": ("step", "path"),
    "on_end": ("result",),
}
"""What each event of a callback is given."""


class EngineContract(ComponentContract):
    """An engine."""

    base = Engine

    def started(self) -> BuiltEngine:
        engine = self.component.build()
        engine.setup("fp32", compile=False)
        return engine

    def step(self) -> Step:
        """A tiny model and the next-token objective, the same every time."""
        model = tiny_model(tiny_tokenizer().vocab_size)
        return Step(model, component("objective", "next_token").build(tiny_run(), tiny_tokenizer()))

    def optimizers(self, named: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW([parameter for _, parameter in named], lr=0.01)]

    def batches(self, number: int) -> list[Batch]:
        """The two micro-batches of a step."""
        batch = TinyDataset(tiny_tokenizer()).batch(4 * number, 4)
        return [batch.rows(0, 1), batch.rows(1, 4)]

    def prepared(self) -> BuiltEngine:
        engine, step = self.started(), self.step()
        engine.prepare(step.to(engine.device), self.optimizers)
        return engine

    def run(self, engine: BuiltEngine, numbers: range, clip: float | None = 1.0) -> list[float]:
        """Whole steps as the trainer makes them; the gradient norms."""
        norms = []
        for number in numbers:
            batches = [batch.to(engine.device) for batch in self.batches(number)]
            weight = sum(batch.n_targets() for batch in batches)
            for index, batch in enumerate(batches):
                engine.backward(engine.loss_of(batch, last=index == 1).total / weight)
            norms.append(float(engine.clip(clip)))
            engine.update(skip=False)
        return norms

    def test_it_says_where_and_in_what_it_computes(self) -> None:
        engine = self.started()
        assert isinstance(engine.device, torch.device)
        assert engine.precision == "fp32"
        assert 0 <= engine.rank < engine.world_size
        assert engine.is_main == (engine.rank == 0)
        automatic = self.component.build()
        automatic.setup("auto", compile=False)
        assert automatic.precision in ("fp32", "bf16")

    def test_steps_equal_those_of_a_plain_loop(self) -> None:
        engine = self.prepared()
        norms = self.run(engine, range(3), clip=0.5)
        plain = self.step()
        (optimizer,) = self.optimizers(list(plain.named_parameters()))
        expected = []
        for number in range(3):
            batches = self.batches(number)
            weight = sum(batch.n_targets() for batch in batches)
            for batch in batches:
                (plain(batch).total / weight).backward()
            expected.append(float(nn.utils.clip_grad_norm_(plain.parameters(), 0.5)))
            optimizer.step()
            optimizer.zero_grad()
        assert norms == pytest.approx(expected, rel=1e-5)
        for name, tensor in engine.state().items():
            assert_close(tensor.cpu(), plain.state_dict()[name], 1e-6)

    def test_clipping_bounds_the_norm_and_none_leaves_it(self) -> None:
        engine = self.prepared()
        (batch, _) = self.batches(0)
        engine.backward(engine.loss_of(batch.to(engine.device), last=True).total)
        norm = float(engine.clip(None))
        assert float(engine.clip(norm / 4)) == pytest.approx(norm, rel=1e-5)
        assert float(engine.clip(None)) == pytest.approx(norm / 4, rel=1e-4)

    def test_a_skipped_update_changes_nothing_and_clears_the_gradients(self) -> None:
        engine = self.prepared()
        before = {name: tensor.clone() for name, tensor in engine.state().items()}
        (batch, _) = self.batches(0)
        engine.backward(engine.loss_of(batch.to(engine.device), last=True).total)
        engine.update(skip=True)
        assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state().items())
        norm = self.run(engine, range(1))
        assert norm == self.run(self.prepared(), range(1)), "gradients were left behind"

    def test_state_has_the_names_and_shapes_of_the_step(self) -> None:
        engine = self.prepared()
        shapes = {name: tensor.shape for name, tensor in self.step().state_dict().items()}
        assert {name: tensor.shape for name, tensor in engine.state().items()} == shapes

    def test_optimizer_state_travels_by_parameter_name_bit_for_bit(self) -> None:
        engine = self.prepared()
        self.run(engine, range(2))
        names = set(dict(self.step().named_parameters()))
        state = {path: tensor.clone() for path, tensor in engine.optimizer_state().items()}
        assert {path.rpartition("/")[0] for path in state} <= names
        other = self.prepared()
        other.load_state({name: tensor.clone() for name, tensor in engine.state().items()})
        other.load_optimizer_state(state)
        self.run(engine, range(2, 4))
        self.run(other, range(2, 4))
        assert all(torch.equal(tensor, engine.state()[name]) for name, tensor in other.state().items())

    def test_optimizer_state_of_another_model_is_refused(self) -> None:
        engine = self.prepared()
        self.run(engine, range(1))
        state = engine.optimizer_state()
        with pytest.raises(CheckpointError, match="nobody"):
            engine.load_optimizer_state({"nobody.weight/exp_avg": torch.zeros(2)})
        path = next(path for path, tensor in state.items() if tensor.ndim)
        with pytest.raises(CheckpointError, match=r"shape"):
            engine.load_optimizer_state(state | {path: torch.zeros(3, 1, 2)})

    def test_the_sum_of_one_process_is_its_value(self) -> None:
        engine = self.started()
        if engine.world_size == 1:
            assert float(engine.sum(torch.tensor(2.5, device=engine.device))) == 2.5
            assert engine.any(True)
            assert not engine.any(False)

    def test_bf16_computes_low_and_keeps_parameters_high(self) -> None:
        engine, step = self.component.build(), self.step()
        engine.setup("bf16", compile=False)
        engine.prepare(step.to(engine.device), self.optimizers)
        self.run(engine, range(1))
        assert {tensor.dtype for tensor in engine.state().values()} == {torch.float32}
        with engine.autocast():
            product = torch.ones(2, 2, device=engine.device) @ torch.ones(2, 2, device=engine.device)
        assert product.dtype == torch.bfloat16


class _Witness:
    """A callback that writes down what it is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_start(self) -> None:
        self.seen.append("start")

    def on_step(self, step: int, metrics: dict[str, Any]) -> None:
        assert "loss" in metrics
        self.seen.append(f"step {step}")

    def on_end(self, result: Any) -> None:
        self.seen.append(f"end {result.state}")


class TrainerContract(ComponentContract):
    """A training loop whose length is its option `steps`. Override `run` when it needs other tables.

    Before `train()` comes `resume(folder)`, with None where nothing is to be continued.
    """

    base = Trainer

    def run(self, **tables: Any) -> Any:
        return tiny_run(train=self.component, **tables)

    def built(self, folder: Path, **tables: Any) -> Any:
        run = self.run(out=str(folder), **tables)
        return run.train.build(run, RunDirectory.create(run, config_input=""))

    def test_it_runs_to_its_end(self, tmp_path: Path) -> None:
        trainer = self.built(tmp_path)
        trainer.resume(None)
        result = trainer.train()
        assert (result.state, result.step) == ("done", self.component.steps)

    def test_the_model_is_trained_and_the_same_again(self, tmp_path: Path) -> None:
        trainer, again = self.built(tmp_path), self.built(tmp_path)
        before = weights(trainer.model)
        trainer.train()
        assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
        again.train()
        assert_same_weights(again.model, weights(trainer.model))

    def test_evaluating_more_often_changes_no_weight(self, tmp_path: Path) -> None:
        rarely, often = self.built(tmp_path), self.built(tmp_path, eval={"every": 1})
        rarely.train()
        often.train()
        assert_same_weights(often.model, weights(rarely.model))

    def test_callbacks_hear_of_every_step(self, tmp_path: Path) -> None:
        trainer, witness = self.built(tmp_path), _Witness()
        trainer.callbacks.append(witness)
        trainer.train()
        steps = [f"step {step}" for step in range(1, self.component.steps + 1)]
        assert witness.seen == ["start", *steps, "end done"]

    def test_it_stops_when_asked(self, tmp_path: Path) -> None:
        trainer = self.built(tmp_path)
        trainer.request_stop("enough")
        result = trainer.train()
        assert (result.state, result.reason) == ("stopped", "enough")


class CallbackContract(ComponentContract):
    """An observer, on a run of three steps with an evaluation after each. Override `run` when it needs other tables."""

    base = Callback

    def run(self, folder: Path, callbacks: list[Callback]) -> Any:
        return tiny_run(out=str(folder), callbacks=callbacks, eval={"every": 1})

    def trainer(self, folder: Path, *callbacks: Callback) -> Any:
        run = self.run(folder, list(callbacks))
        return run.train.build(run, RunDirectory.create(run, config_input=""))

    def observer(self, folder: Path) -> Any:
        return self.trainer(folder, self.component).callbacks[-1]

    def test_it_listens_to_events_that_exist(self, tmp_path: Path) -> None:
        observer = self.observer(tmp_path)
        listens = {name for name in dir(observer) if name.startswith("on_")}
        assert listens, "it listens to nothing"
        assert listens <= set(EVENTS), f"no such event: {sorted(listens - set(EVENTS))}"

    def test_it_takes_what_events_give(self, tmp_path: Path) -> None:
        observer = self.observer(tmp_path)
        for name in EVENTS:
            if hasattr(observer, name):
                inspect.signature(getattr(observer, name)).bind(*ARGUMENTS[name])

    def test_watching_changes_no_weight(self, tmp_path: Path) -> None:
        watched, alone = self.trainer(tmp_path, self.component), self.trainer(tmp_path)
        assert watched.train().state == "done"
        alone.train()
        assert_same_weights(watched.model, weights(alone.model))

    def test_its_state_is_json_and_comes_back(self, tmp_path: Path) -> None:
        trainer = self.trainer(tmp_path, self.component)
        trainer.train()
        observer = trainer.callbacks[-1]
        if not hasattr(observer, "state_dict"):
            return
        state = json.loads(json.dumps(observer.state_dict(), allow_nan=False))
        other = self.observer(tmp_path)
        other.load_state_dict(state)
        assert other.state_dict() == observer.state_dict()
