"""The contract of a memory: explicit state passed in and out, silent while empty and untrained.

B batch, T time, D model width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from sky_core.errors import UserError
from sky_core.slots import Memory
from sky_core.testing.component import ComponentContract
from sky_core.testing.workbench import (
    Feed,
    assert_close,
    assert_every_parameter_learns,
    assert_same_weights,
    fresh,
    generators_untouched,
    layer_spec,
    noise,
    shaken,
    weights,
)


class MemoryContract(ComponentContract):
    """A memory beside attention."""

    base = Memory
    stepwise: ClassVar[bool] = True
    """Reading token by token gives what reading in larger pieces gives; if not, pieces are `segment` tokens long."""
    segment: ClassVar[int] = 4
    """Tokens of a piece in these tests."""
    tolerance: ClassVar[float] = 1e-5

    def untrained(self) -> nn.Module:
        return fresh(self.component.build, layer_spec())

    def memory(self) -> nn.Module:
        """The memory as training might leave it: every parameter moved."""
        return shaken(self.untrained())

    def feed(self, memory: nn.Module, batch: int = 2, *, cached: bool = True) -> Feed:
        return Feed(memory, batch, cached=cached, slot="memories")

    def read(self, feed: Feed, x_BTD: torch.Tensor) -> torch.Tensor:
        return torch.cat([feed(piece) for piece in x_BTD.split(self.segment, dim=1)], dim=1)

    def test_empty_and_untrained_it_adds_nothing(self) -> None:
        for cached in (True, False):
            y_BTD = self.feed(self.untrained(), cached=cached)(noise(2, self.segment, 32))
            assert y_BTD.shape == (2, self.segment, 32)
            assert not y_BTD.any()

    def test_what_was_read_before_is_remembered(self) -> None:
        memory, later = self.memory(), noise(2, self.segment, 32)
        outputs = []
        for seed in (1, 2):
            feed = self.feed(memory)
            feed(noise(2, self.segment, 32, seed=seed))
            outputs.append(feed(later))
        assert (outputs[0] - outputs[1]).abs().max() > 1e-4, "two pasts, one memory"

    def test_nothing_is_remembered_outside_of_the_state(self) -> None:
        memory, x_BTD = self.memory(), noise(2, self.segment, 32)
        before, first = weights(memory), self.feed(memory)(x_BTD)
        self.feed(memory)(noise(2, self.segment, 32, seed=1))
        assert torch.equal(self.feed(memory)(x_BTD), first)
        assert_same_weights(memory, before)
        self.feed(memory, cached=False)(x_BTD)

    def test_future_tokens_do_not_change_the_past(self) -> None:
        x_BTD = noise(2, 3 * self.segment, 32)
        changed = x_BTD.clone()
        changed[:, -2:] = noise(2, 2, 32, seed=1)
        memory = self.memory()
        one, two = (self.read(self.feed(memory), x) for x in (x_BTD, changed))
        assert_close(two[:, :-2], one[:, :-2], self.tolerance)

    def test_pieces_of_any_size_give_the_same(self) -> None:
        if not self.stepwise:
            return
        memory, x_BTD = self.memory(), noise(2, 2 * self.segment, 32)
        by_token = self.feed(memory)
        stepwise = torch.cat([by_token(token) for token in x_BTD.split(1, dim=1)], dim=1)
        assert_close(stepwise, self.read(self.feed(memory), x_BTD), self.tolerance)

    def test_rows_do_not_mix(self) -> None:
        memory, x_BTD = self.memory(), noise(3, 2 * self.segment, 32)
        together = self.read(self.feed(memory, 3), x_BTD)
        for row in range(3):
            assert_close(together[row], self.read(self.feed(memory, 1), x_BTD[row, None])[0], self.tolerance)

    def test_selected_rows_go_on_as_they_were(self) -> None:
        memory, x_BTD = self.memory(), noise(2, 2 * self.segment, 32)
        feed = self.feed(memory)
        feed(x_BTD[:, : self.segment])
        expected = self.read(self.feed(memory), x_BTD)[:, self.segment :]
        assert feed.cache is not None
        feed.cache = feed.cache.select([1, 0])
        assert_close(feed(x_BTD[[1, 0], self.segment :]), expected[[1, 0]], self.tolerance)

    def test_reset_rows_have_forgotten_and_others_not(self) -> None:
        memory, x_BTD = self.memory(), noise(2, 2 * self.segment, 32)
        feed = self.feed(memory)
        feed(x_BTD[:, : self.segment])
        assert feed.cache is not None
        state = feed.cache.memories[1]
        assert state is not None
        state.reset(torch.tensor([True, False]))
        y_BTD = feed(x_BTD[:, self.segment :])
        assert_close(y_BTD[0], self.feed(memory)(x_BTD[:, self.segment :])[0], self.tolerance)
        assert_close(y_BTD[1], self.read(self.feed(memory), x_BTD)[1, self.segment :], self.tolerance)

    def test_tokens_taken_back_leave_no_trace(self) -> None:
        """What decoding with a draft needs; a state that cannot go back says so."""
        memory, x_BTD = self.memory(), noise(2, 2 * self.segment, 32)
        feed = self.feed(memory)
        for piece in (x_BTD[:, : self.segment], noise(2, self.segment, 32, seed=1)):
            feed(piece)
        assert feed.cache is not None
        try:
            feed.cache.rollback([self.segment] * 2)
        except UserError:
            return
        y_BTD = feed(x_BTD[:, self.segment :])
        assert_close(y_BTD, self.read(self.feed(memory), x_BTD)[:, self.segment :], self.tolerance)

    def test_detached_state_carries_values_and_no_gradient(self) -> None:
        memory, x_BTD = self.memory(), noise(2, 2 * self.segment, 32).requires_grad_()
        feed = self.feed(memory)
        feed(x_BTD[:, : self.segment])
        assert feed.cache is not None
        feed.cache.memories = [state and state.detach() for state in feed.cache.memories]
        y_BTD = feed(x_BTD[:, self.segment :])
        assert_close(y_BTD, self.read(self.feed(memory), x_BTD)[:, self.segment :], self.tolerance)
        (gradient,) = torch.autograd.grad(y_BTD.sum(), x_BTD)
        assert not gradient[:, : self.segment].any(), "the gradient runs through a detached state"

    def test_every_parameter_gets_a_finite_gradient(self) -> None:
        memory = self.memory()
        y_BTD = self.read(self.feed(memory), noise(2, 2 * self.segment, 32))
        assert_every_parameter_learns(memory, y_BTD.square().sum())

    def test_reading_draws_no_random_numbers(self) -> None:
        memory = self.memory()
        with generators_untouched():
            self.read(self.feed(memory), noise(2, 2 * self.segment, 32))

    def test_state_has_the_batch_first_and_names_its_tensors(self) -> None:
        state = self.memory().new_cache(3, 16, torch.device("cpu"), torch.float32)
        assert state.tensors()
        assert all(tensor.shape[0] == 3 for tensor in state.tensors().values())
        assert state.replace(state.tensors()).tensors().keys() == state.tensors().keys()
