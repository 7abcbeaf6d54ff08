"""The contracts of optimizers (groups of parameters, state that travels) and schedules (pure functions of the step)."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from sky_core.slots import Optimizer, Schedule
from sky_core.testing.component import ComponentContract
from sky_core.testing.workbench import assert_same_weights, noise, tiny_model, weights


class OptimizerContract(ComponentContract):
    """An optimizer, on the parameters of a tiny decoder. `steps` must suffice to bring its loss down by a tenth."""

    base = Optimizer
    steps: ClassVar[int] = 30

    def model(self) -> nn.Module:
        return tiny_model(61)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return self.component.build(list(model.named_parameters()))

    def loss(self, model: nn.Module) -> torch.Tensor:
        tokens_BT = torch.arange(60).view(4, 15) % 13
        return nn.functional.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())

    def run(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> list[float]:
        """`steps` updates; the loss before each."""
        losses = []
        for _ in range(steps):
            loss = self.loss(model)
            losses.append(loss.item())
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return losses

    def test_every_trainable_parameter_is_in_exactly_one_group(self) -> None:
        model = self.model()
        frozen = next(model.parameters()).requires_grad_(False)
        grouped = [p for o in self.optimizers(model) for group in o.param_groups for p in group["params"]]
        assert len({id(p) for p in grouped}) == len(grouped), "a parameter stands in two groups"
        assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p is not frozen}

    def test_factors_of_the_learning_rate_move_no_parameter_out_of_its_group(self) -> None:
        """muP gives some parameters a smaller rate; a rule without need of that takes the factors and leaves them."""
        model = self.model()
        factors = {name: 0.5 for name, parameter in model.named_parameters() if parameter.ndim > 1}
        groups = [g for o in self.component.build(list(model.named_parameters()), factors) for g in o.param_groups]
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, model.parameters()))
        plain = {id(p): g["lr"] for o in self.optimizers(model) for g in o.param_groups for p in g["params"]}
        for group in groups:
            for parameter in group["params"]:
                assert group["lr"] == plain[id(parameter)] or (
                    parameter.ndim > 1 and math.isclose(group["lr"], plain[id(parameter)] / 2)
                )

    def test_every_group_has_its_peak_learning_rate(self) -> None:
        groups = [group for optimizer in self.optimizers(self.model()) for group in optimizer.param_groups]
        assert all(group["lr"] > 0 for group in groups)

    def test_a_learning_rate_of_zero_changes_nothing(self) -> None:
        model = self.model()
        optimizers, before = self.optimizers(model), weights(model)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = 0.0
        self.run(model, optimizers, 2)
        assert_same_weights(model, before)

    def test_the_loss_falls(self) -> None:
        model = self.model()
        losses = self.run(model, self.optimizers(model), self.steps)
        assert losses[-1] < 0.9 * losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f} in {self.steps} steps"

    def test_a_parameter_without_gradient_is_left_alone(self) -> None:
        model, outsider = self.model(), nn.Parameter(noise(3, 3))
        expected = outsider.detach().clone()
        optimizers = self.component.build([*model.named_parameters(), ("outsider.weight", outsider)])
        self.run(model, optimizers, 2)
        assert torch.equal(outsider, expected)

    def test_saved_and_loaded_it_goes_on_bit_for_bit(self) -> None:
        model = self.model()
        optimizers = self.optimizers(model)
        self.run(model, optimizers, 3)
        other = copy.deepcopy(model)
        others = self.optimizers(other)
        for mine, theirs in zip(others, optimizers, strict=True):
            mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
        self.run(model, optimizers, 2)
        self.run(other, others, 2)
        assert_same_weights(other, weights(model))

    def test_the_state_is_tensors_by_parameter(self) -> None:
        model = self.model()
        optimizers = self.optimizers(model)
        self.run(model, optimizers, 1)
        entries: list[Any] = [value for o in optimizers for state in o.state.values() for value in state.values()]
        assert all(isinstance(value, torch.Tensor) for value in entries), "checkpoints hold tensors only"


class ScheduleContract(ComponentContract):
    """A learning-rate schedule."""

    base = Schedule

    @pytest.mark.parametrize("steps", [1, 2, 10, 1000])
    def test_multipliers_are_not_negative_and_peak_at_one(self, steps: int) -> None:
        multiplier = self.component.build(steps)
        values = [multiplier(step) for step in range(steps)]
        assert all(math.isfinite(value) and value >= 0 for value in values)
        assert max(values) == pytest.approx(1)

    def test_it_depends_on_the_step_alone(self) -> None:
        multiplier = self.component.build(100)
        forwards = [multiplier(step) for step in range(100)]
        assert forwards == [multiplier(step) for step in reversed(range(100))][::-1]
        assert forwards == [self.component.build(100)(step) for step in range(100)]
