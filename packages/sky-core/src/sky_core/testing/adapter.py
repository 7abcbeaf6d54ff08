"""The contract of an adapter: silent until trained, the base untouched, gone without a trace when detached."""

from __future__ import annotations

from typing import Any

import torch

from sky_core.model.language_model import LanguageModel
from sky_core.slots import Adapter
from sky_core.testing.component import ComponentContract
from sky_core.testing.workbench import (
    assert_close,
    assert_every_parameter_learns,
    assert_same_weights,
    shaken,
    tiny_model,
    weights,
)

VOCAB = 61


class AdapterContract(ComponentContract):
    """An adapter, attached to a tiny decoder with an untied head. Override `model` when it needs another."""

    base = Adapter

    def model(self) -> LanguageModel:
        return shaken(tiny_model(VOCAB, tie_embeddings=False))

    def attach(self, model: LanguageModel) -> Any:
        torch.manual_seed(1)
        return self.component.build(model)

    def trained(self, model: LanguageModel) -> Any:
        """The adapter as training might leave it: every parameter moved."""
        attached = self.attach(model)
        shaken(attached.module)
        return attached

    def tokens(self, seed: int = 0) -> torch.Tensor:
        return torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(seed))

    def test_attached_it_changes_nothing_bit_for_bit(self) -> None:
        model, tokens_BT = self.model(), self.tokens()
        before = model(tokens_BT)
        self.attach(model)
        assert torch.equal(model(tokens_BT), before)

    def test_names_and_weights_of_the_base_stay(self) -> None:
        model = self.model()
        before = weights(model)
        self.trained(model)
        assert_same_weights(model, before)

    def test_only_its_own_parameters_train(self) -> None:
        model = self.model()
        attached = self.trained(model)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        own = [parameter for parameter in attached.module.parameters() if parameter.requires_grad]
        assert own
        assert_every_parameter_learns(attached.module, model.nll(model.hidden(self.tokens()), self.tokens(1)))
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_fresh_it_can_learn(self) -> None:
        model = self.model()
        attached = self.attach(model)
        model.nll(model.hidden(self.tokens()), self.tokens(1)).backward()
        gradients = [p.grad for p in attached.module.parameters() if p.grad is not None]
        assert any(gradient.any() for gradient in gradients), "no gradient leaves the point of no change"

    def test_trained_it_changes_the_output(self) -> None:
        model, tokens_BT = self.model(), self.tokens()
        before = model(tokens_BT)
        self.trained(model)
        assert (model(tokens_BT) - before).abs().max() > 1e-4

    def test_nll_sees_the_adapter_as_the_logits_do(self) -> None:
        model, tokens_BT, targets_BT = self.model(), self.tokens(), self.tokens(1)
        self.trained(model)
        expected = torch.nn.functional.cross_entropy(model(tokens_BT).mT, targets_BT, reduction="sum")
        assert_close(model.nll(model.hidden(tokens_BT), targets_BT), expected)

    def test_detached_the_base_is_what_it_was_bit_for_bit(self) -> None:
        model, tokens_BT = self.model(), self.tokens()
        before, output, trainable = weights(model), model(tokens_BT), _trainable(model)
        attached = self.trained(model)
        model(tokens_BT)
        attached.detach()
        assert torch.equal(model(tokens_BT), output)
        assert_same_weights(model, before)
        assert _trainable(model) == trainable
        assert model.adapters == []

    def test_its_state_alone_brings_it_back(self) -> None:
        model, tokens_BT = self.model(), self.tokens()
        attached = self.trained(model)
        expected, state = model(tokens_BT), weights(attached.module)
        assert not set(state) & set(model.state_dict()), "names of the base in the adapter's state"
        attached.detach()
        again = self.attach(model)
        again.module.load_state_dict(state)
        assert torch.equal(model(tokens_BT), expected)

    def test_decoding_in_pieces_equals_the_parallel_forward(self) -> None:
        model, tokens_BT = self.model(), self.tokens()
        self.trained(model)
        with torch.no_grad():
            cache = model.new_cache(2)
            decoded = torch.cat([model(piece, cache=cache) for piece in tokens_BT.split([4, 1, 6], dim=1)], dim=1)
            assert_close(decoded, model(tokens_BT))

    def test_two_of_them_can_be_attached_and_taken_off_in_any_order(self) -> None:
        model, tokens_BT = self.model(), self.tokens()
        output, trainable = model(tokens_BT), _trainable(model)
        first = self.trained(model)
        expected = model(tokens_BT)
        second = self.trained(model)
        second.detach()
        assert torch.equal(model(tokens_BT), expected)
        third = self.trained(model)
        first.detach()
        third.detach()
        assert torch.equal(model(tokens_BT), output)
        assert _trainable(model) == trainable


def _trainable(model: LanguageModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
