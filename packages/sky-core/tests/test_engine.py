"""The local engine, beyond its contract (`test_contracts.py`): what a step holds and what is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sky_core.model.adapter import Attached, linears
from sky_core.testing.workbench import TinyDataset, component, tiny_model, tiny_run, tiny_tokenizer, weights
from sky_core.training.engine import LocalEngine, Step


def step(adapted: bool = False) -> Step:
    model = tiny_model(tiny_tokenizer().vocab_size)
    if adapted:
        shift = nn.Linear(16, 16)
        attached = Attached(model, shift)
        attached.linear(linears(model, ["q_proj"])["layers.0.self_attn.q_proj"], lambda x, y: y + shift(x))
    return Step(model, component("objective", "next_token").build(tiny_run(), tiny_tokenizer()))


def prepared(made: Step, *, compile: bool = False) -> LocalEngine:
    engine = LocalEngine()
    engine.setup("fp32", compile=compile)
    engine.prepare(made.to(engine.device), lambda named: [torch.optim.AdamW([p for _, p in named], lr=0.1)])
    return engine


def test_names_of_the_state_say_which_part_they_belong_to() -> None:
    plain, adapted = step(), step(adapted=True)
    assert {name.split(".")[0] for name in plain.state_dict()} == {"model"}
    assert set(adapted.state_dict()) - set(plain.state_dict()) == {"adapters.0.weight", "adapters.0.bias"}


def test_only_what_is_attached_is_trained() -> None:
    made = step(adapted=True)
    engine = prepared(made)
    base, attached = weights(made.model), weights(made.adapters)
    batch = TinyDataset(tiny_tokenizer()).batch(0, 2).to(engine.device)
    engine.backward(engine.loss_of(batch, last=True).total)
    engine.update(skip=False)
    assert all(torch.equal(tensor, base[name]) for name, tensor in made.model.state_dict().items())
    assert not any(torch.equal(tensor, attached[name]) for name, tensor in made.adapters.state_dict().items())
    assert {name.split("/")[0] for name in engine.optimizer_state()} == {"adapters.0.weight", "adapters.0.bias"}


def test_layers_are_compiled_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    made = step()
    compiled: list[bool] = []
    monkeypatch.setattr(type(made.model), "compile_layers", lambda self: compiled.append(True))
    prepared(made)
    assert compiled == []
    prepared(made, compile=True)
    assert compiled == [True]


def test_an_adapter_is_trained_averaged_saved_resumed_and_loaded(lab: Any) -> None:
    Path("shift.py").write_text(
        """
from typing import ClassVar
import torch
from sky_core import hookimpl, slots

class Shift(slots.Adapter):
    "Adds a trained map to one projection."
    kind: ClassVar = "shift"
    def build(self, model):
        from sky_core.model.adapter import Attached, linears
        module = torch.nn.Linear(16, 16)
        attached = Attached(model, module)
        attached.linear(linears(model, ["q_proj"])["layers.0.self_attn.q_proj"], lambda x, y: y + module(x))
        return attached

@hookimpl
def sky_adapters(): return [Shift]
"""
    )
    import sky_core
    from sky_core.training import checkpoint

    lab.write(plugins=["./shift.py"], adapters=["shift"], train={"ema": 0.5})
    straight = lab.train().directory
    with lab.during(3, lambda trainer: trainer.request_stop("enough")):
        run = lab.train().directory
    lab.resume(run)
    assert lab.tensors(run) == lab.tensors(straight)
    folder = run / "checkpoints" / "last"
    saved, averages = checkpoint.load_tensors(folder, "adapters"), checkpoint.load_tensors(folder, "training/ema")
    assert saved.keys() == {"0.weight", "0.bias"}
    assert averages.keys() == {"adapters.0.weight", "adapters.0.bias", "n_updates"}
    model, _ = sky_core.load(run)
    (attached,) = model.adapters
    assert torch.equal(attached.module.weight, averages["adapters.0.weight"])
    assert not torch.equal(attached.module.weight, saved["0.weight"])
    assert not attached.module.training


def test_parameters_that_no_loss_reaches_are_no_obstacle() -> None:
    made = step()
    made.objective.register_parameter("idle", nn.Parameter(torch.ones(2)))
    engine = prepared(made)
    batch = TinyDataset(tiny_tokenizer()).batch(0, 2).to(engine.device)
    engine.backward(engine.loss_of(batch, last=True).total)
    engine.clip(1.0)
    engine.update(skip=False)
    assert torch.equal(made.objective.idle, torch.ones(2, device=engine.device))
    assert not any(name.startswith("objective.idle") for name in engine.optimizer_state())
