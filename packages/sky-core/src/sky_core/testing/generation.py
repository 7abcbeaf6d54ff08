"""The contracts of samplers (choose the next token) and evaluations (measure a model and leave it as it was).

B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import ClassVar

import torch

from sky_core.data.dataset import Dataset
from sky_core.model.language_model import LanguageModel
from sky_core.slots import Eval, Sampler
from sky_core.testing.component import ComponentContract
from sky_core.testing.workbench import (
    TinyDataset,
    assert_close,
    assert_same_weights,
    generators_untouched,
    noise,
    tiny_model,
    tiny_tokenizer,
    weights,
)
from sky_core.tokenizer.base import Tokenizer


class SamplerContract(ComponentContract):
    """A sampler."""

    base = Sampler
    states_probabilities: ClassVar[bool] = True
    """Says what it draws from (`probabilities`); without it the sampler cannot be used with a draft."""

    def sampler(self) -> Callable[..., torch.Tensor]:
        return self.component.build()

    def draw(self, logits_BV: torch.Tensor, seed: int = 0) -> torch.Tensor:
        tokens = [[1, 2, 3][: row % 4] for row in range(len(logits_BV))]
        return self.sampler()(logits_BV, tokens, torch.Generator().manual_seed(seed))

    def test_it_gives_one_id_of_the_vocabulary_per_row(self) -> None:
        for rows in (1, 5):
            next_B = self.draw(noise(rows, 11))
            assert next_B.shape == (rows,)
            assert next_B.dtype == torch.int64
            assert ((next_B >= 0) & (next_B < 11)).all()

    def test_a_seed_gives_the_same_tokens_again(self) -> None:
        assert torch.equal(self.draw(noise(50, 11), seed=3), self.draw(noise(50, 11), seed=3))

    def test_only_the_given_generator_is_drawn_from(self) -> None:
        with generators_untouched():
            self.draw(noise(5, 11))

    def test_impossible_tokens_are_never_chosen(self) -> None:
        logits_BV = noise(200, 11)
        logits_BV[:, ::2] = -torch.inf
        assert (self.draw(logits_BV) % 2 == 1).all()

    def test_a_certain_token_is_chosen(self) -> None:
        logits_BV = torch.full((11, 11), -1e4).fill_diagonal_(1e4)
        assert torch.equal(self.draw(logits_BV), torch.arange(11))

    def test_it_draws_from_the_probabilities_that_it_states(self) -> None:
        sampler, rows = self.sampler(), 4000
        if not self.states_probabilities:
            assert not hasattr(sampler, "probabilities")
            return
        logits_BV, tokens = noise(3, 11), [[1, 2, 2], [], [5]]
        p_BV = sampler.probabilities(logits_BV, tokens)  # type: ignore[attr-defined]
        assert p_BV.dtype == torch.float64
        assert_close(p_BV.sum(-1), torch.ones(3, dtype=torch.float64), 1e-9)
        for row in range(3):
            drawn = sampler(logits_BV[row].expand(rows, -1), [tokens[row]] * rows, torch.Generator().manual_seed(row))
            share_V = torch.bincount(drawn, minlength=11) / rows
            # five standard deviations of a share of 4000 are at most 5 * 0.5 / sqrt(4000)
            assert (share_V - p_BV[row]).abs().max() < 0.04

    def test_the_logits_are_left_as_they_were(self) -> None:
        logits_BV = noise(5, 11)
        before = logits_BV.clone()
        self.draw(logits_BV)
        assert torch.equal(logits_BV, before)

    def test_bf16_logits_are_taken(self) -> None:
        assert self.draw(noise(5, 11).bfloat16()).shape == (5,)


class EvalContract(ComponentContract):
    """An evaluation. Override `model` or `dataset` when it needs others."""

    base = Eval

    def tokenizer(self) -> Tokenizer:
        return tiny_tokenizer()

    def model(self) -> LanguageModel:
        return tiny_model(self.tokenizer().vocab_size)

    def dataset(self) -> Dataset:
        return TinyDataset(self.tokenizer())

    def measure(self, model: LanguageModel) -> dict[str, float]:
        return self.component.build()(model, self.tokenizer(), self.dataset(), nullcontext)

    def test_it_gives_named_finite_numbers(self) -> None:
        results = self.measure(self.model())
        assert results
        assert all(isinstance(name, str) and math.isfinite(value) for name, value in results.items())

    def test_measuring_twice_gives_the_same_numbers(self) -> None:
        model = self.model()
        assert self.measure(model) == self.measure(model)

    def test_random_generators_are_left_as_they_were(self) -> None:
        with generators_untouched():
            self.measure(self.model())

    def test_the_model_is_left_as_it_was(self) -> None:
        model = self.model().train()
        next(module for module in model.modules() if not list(module.children())).eval()
        modes, before = [module.training for module in model.modules()], weights(model)
        self.measure(model)
        assert [module.training for module in model.modules()] == modes, "training mode changed"
        assert all(parameter.grad is None for parameter in model.parameters()), "gradients were left behind"
        assert_same_weights(model, before)

    def test_the_mode_of_the_model_does_not_change_the_numbers(self) -> None:
        model = self.model()
        assert self.measure(model.train()) == self.measure(model.eval())
