"""The contract of a language model: hidden states, logits, loss, caches and state dicts that agree with each other.

B batch, T time (tokens), D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from sky_core.data.dataset import IGNORE
from sky_core.model.cache import Cache
from sky_core.model.language_model import LanguageModel
from sky_core.slots import Model
from sky_core.testing.component import ComponentContract
from sky_core.testing.workbench import (
    assert_close,
    assert_compiles,
    assert_every_parameter_learns,
    assert_same_weights,
    shaken,
    started,
    weights,
)

VOCAB = 61


class ModelContract(ComponentContract):
    """An architecture. Keep it tiny: two or three layers, no dropout, `max_length` of 16 to 64 tokens."""

    base = Model
    causal: ClassVar[bool] = True
    """Predicts from the past alone (and decodes with a cache)."""
    documents: ClassVar[bool] = True
    """Keeps the documents of a packed row apart."""
    tolerance: ClassVar[float] = 1e-5

    def fresh(self, seed: int = 0) -> LanguageModel:
        torch.manual_seed(seed)
        return started(lambda: self.component.build(VOCAB)).eval()

    def model(self, seed: int = 0) -> LanguageModel:
        """The model with noise on every parameter, in evaluation mode."""
        return shaken(self.fresh(seed))

    def tokens(self, batch: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
        return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))

    def test_it_says_how_large_it_is(self) -> None:
        model = self.fresh()
        assert model.vocab_size == VOCAB
        assert model.n_layer >= 1
        assert model.max_length >= 11, "the contract needs sequences of 11 tokens"

    def test_logits_are_those_of_the_hidden_states(self) -> None:
        model, tokens_BT = self.model(), self.tokens()
        logits_BTV = model(tokens_BT)
        assert logits_BTV.shape == (*tokens_BT.shape, VOCAB)
        assert torch.equal(logits_BTV, model.logits(model.hidden(tokens_BT)))

    @pytest.mark.parametrize("rows", [1, 7, 40])
    def test_nll_is_the_summed_cross_entropy_of_the_targets(self, rows: int) -> None:
        model, tokens_BT, targets_BT = self.model(), self.tokens(rows), self.tokens(rows, seed=1)
        targets_BT[0, 3:] = IGNORE
        hidden_BTD = model.hidden(tokens_BT).detach().requires_grad_()
        expected = nn.functional.cross_entropy(
            model.logits(hidden_BTD).flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        actual = model.nll(hidden_BTD, targets_BT)
        assert_close(actual, expected, self.tolerance)
        mine, theirs = (torch.autograd.grad(loss, hidden_BTD)[0] for loss in (actual, expected))
        assert_close(mine, theirs, self.tolerance)

    def test_nll_of_nothing_is_zero(self) -> None:
        model, tokens_BT = self.model(), self.tokens()
        nll = model.nll(model.hidden(tokens_BT), torch.full_like(tokens_BT, IGNORE))
        nll.backward()
        assert nll == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())

    def test_future_tokens_do_not_change_the_past(self) -> None:
        if not self.causal:
            pytest.skip("causal = False: sees both sides")
        model, tokens_BT = self.model(), self.tokens()
        changed = tokens_BT.clone()
        changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
        assert_close(model(changed)[:, :7], model(tokens_BT)[:, :7], self.tolerance)

    def test_rows_do_not_mix(self) -> None:
        model, tokens_BT = self.model(), self.tokens(3)
        assert_close(model(tokens_BT)[1], model(tokens_BT[1:2])[0], self.tolerance)

    def test_documents_of_a_packed_row_are_as_if_alone(self) -> None:
        if not self.documents:
            pytest.skip("documents = False: sees across documents")
        model, tokens_BT = self.model(), self.tokens(1)
        documents_BT = torch.tensor([[0] * 4 + [1] * 7])
        positions_BT = torch.tensor([[*range(4), *range(7)]])
        packed = model(tokens_BT, documents_BT=documents_BT, positions_BT=positions_BT)
        alone = torch.cat([model(tokens_BT[:, :4]), model(tokens_BT[:, 4:])], dim=1)
        assert_close(packed, alone, self.tolerance)

    def test_every_parameter_gets_a_finite_gradient(self) -> None:
        model = self.model()
        assert_every_parameter_learns(model, model.nll(model.hidden(self.tokens()), self.tokens(seed=1)))

    def test_a_seed_gives_the_same_weights_again(self) -> None:
        one, same, other = self.fresh(), self.fresh(), self.fresh(1)
        assert_same_weights(same, weights(one))
        assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    def test_fresh_logits_are_near_uniform(self) -> None:
        model, tokens_BT = self.fresh(), self.tokens()
        nll = model.nll(model.hidden(tokens_BT), self.tokens(seed=1)) / tokens_BT.numel()
        assert abs(nll.item() - torch.tensor(float(VOCAB)).log().item()) < 0.5

    def test_weights_travel_through_the_state_dict(self) -> None:
        model, other, tokens_BT = self.model(), self.fresh(1), self.tokens()
        other.load_state_dict(weights(model))
        assert torch.equal(other(tokens_BT), model(tokens_BT))

    def test_parameters_are_counted_once(self) -> None:
        model = self.fresh()
        counts = model.n_parameters()
        assert counts["total"] == sum(p.numel() for p in model.parameters())
        assert counts["embedding"] + counts["body"] == counts["total"]
        assert counts["embedding"] >= VOCAB

    def test_flops_grow_with_the_sequence(self) -> None:
        model = self.fresh()
        assert 0 < model.flops_per_token(4) <= model.flops_per_token(8)

    def test_bf16_autocast_is_finite(self) -> None:
        model = self.model()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(self.tokens()).isfinite().all()
            assert model.nll(model.hidden(self.tokens()), self.tokens(seed=1)).isfinite()

    def test_it_compiles_in_one_graph(self) -> None:
        assert_compiles(self.model(), self.tokens(), tolerance=self.tolerance)

    def test_a_sequence_that_is_too_long_is_refused(self) -> None:
        model = self.fresh()
        with pytest.raises(ValueError, match=str(model.max_length)):
            model(self.tokens(1, model.max_length + 1))

    def test_hidden_states_are_collected_on_request(self) -> None:
        model, tokens_BT = self.model(), self.tokens()
        collect: dict[str, Any] = {"hidden_states": []}
        last_BTD = model.hidden(tokens_BT, collect=collect)
        assert len(collect["hidden_states"]) == model.n_layer + 1
        assert all(state.shape == last_BTD.shape for state in collect["hidden_states"])
        assert torch.equal(last_BTD, model.hidden(tokens_BT)), "collecting changes the result"

    # ------------------------------------------------------------------------------------------ decoding

    def decoded(self, model: LanguageModel, tokens_BT: torch.Tensor, pieces: list[int], cache: Cache) -> torch.Tensor:
        return torch.cat([model(piece, cache=cache) for piece in tokens_BT.split(pieces, dim=1)], dim=1)

    @pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 5, 1]], ids=["steps", "chunks"])
    @torch.no_grad()
    def test_decoding_in_pieces_equals_the_parallel_forward(self, pieces: list[int]) -> None:
        if not self.causal:
            pytest.skip("causal = False: does not decode")
        model, tokens_BT = self.model(), self.tokens()
        cache = model.new_cache(2)
        assert_close(self.decoded(model, tokens_BT, pieces, cache), model(tokens_BT), self.tolerance)
        assert cache.lengths == [11, 11]
        assert cache.nbytes() > 0

    @torch.no_grad()
    def test_rows_of_different_lengths_decode_as_if_alone(self) -> None:
        if not self.causal:
            pytest.skip("causal = False: does not decode")
        model, tokens_BT, lengths = self.model(), self.tokens(3), [2, 7, 4]
        prompts_BT = self.tokens(3, max(lengths), seed=5)
        for row, length in enumerate(lengths):
            prompts_BT[row, :length] = tokens_BT[row, :length]
        valid_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        cache, alone = model.new_cache(3), model(tokens_BT)
        prompt_BTV = model(prompts_BT, valid_BT=valid_BT, cache=cache)
        assert cache.lengths == lengths
        for row, length in enumerate(lengths):
            assert_close(prompt_BTV[row, :length], alone[row, :length], self.tolerance)
        for step in range(4):
            next_B1 = torch.stack([tokens_BT[row, length + step, None] for row, length in enumerate(lengths)])
            for row, logits_1V in enumerate(model(next_B1, cache=cache)):
                assert_close(logits_1V[0], alone[row, lengths[row] + step], self.tolerance)

    @torch.no_grad()
    def test_rows_of_a_cache_can_be_selected_and_reset(self) -> None:
        if not self.causal:
            pytest.skip("causal = False: does not decode")
        model, tokens_BT = self.model(), self.tokens(3)
        cache, alone = model.new_cache(3), model(tokens_BT)
        model(tokens_BT[:, :6], cache=cache)
        chosen = cache.select([2, 0])
        assert_close(model(tokens_BT[[2, 0], 6:], cache=chosen), alone[[2, 0], 6:], self.tolerance)
        cache.reset([0, 1, 2])
        assert cache.lengths == [0, 0, 0]
        assert_close(model(tokens_BT, cache=cache), alone, self.tolerance)
