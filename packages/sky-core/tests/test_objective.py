"""Next-token prediction: a sum with a weight, which is what makes accumulation exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sky_core.data.dataset import IGNORE, Batch
from sky_core.testing.workbench import TinyDataset, tiny_model, tiny_tokenizer
from sky_core.training.objective import NextToken


def ragged(*masked: int) -> Batch:
    """A row for each number: so many of its first targets carry no loss."""
    batch = TinyDataset(tiny_tokenizer()).batch(0, len(masked))
    for row, count in enumerate(masked):
        batch.targets_BT[row, :count] = IGNORE
    return batch


def test_the_total_is_the_summed_loss_of_the_targets_in_float64() -> None:
    model, batch = tiny_model(257), ragged(0, 3, 16, 9)
    loss = NextToken()(model, batch)
    logits_BTV = model.double()(batch.tokens_BT)
    expected = F.cross_entropy(
        logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)  # fp32 sums of 32 terms
    assert loss.parts == {}


def test_sums_and_weights_of_the_parts_are_those_of_the_whole() -> None:
    model, batch, objective = tiny_model(257), ragged(1, 5, 16, 2), NextToken()
    whole = objective(model, batch)
    parts = [batch.rows(row, row + 1) for row in range(4)]
    assert sum(objective.weight(part) for part in parts) == objective.weight(batch) == 3 * 15 - 1 - 5 - 2
    total = sum(objective(model, part).total for part in parts)
    torch.testing.assert_close(total, whole.total, rtol=1e-6, atol=0)


def test_a_batch_without_targets_is_zero_with_zero_gradient() -> None:
    model, objective = tiny_model(257), NextToken()
    loss = objective(model, ragged(16, 16))
    loss.total.backward()
    assert loss.total.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_losses_of_layers_are_means_that_join_at_the_weight_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, objective = tiny_model(257), ragged(4, 0), NextToken()
    plain = objective(model, batch).total.item()
    hidden = type(model).hidden

    def balanced(self: Any, *arguments: Any, collect: dict[str, Any], **options: Any) -> torch.Tensor:
        hidden_BTD = hidden(self, *arguments, collect=collect, **options)
        collect["losses"] = {"balance": torch.tensor(0.5)}
        return hidden_BTD

    monkeypatch.setattr(type(model), "hidden", balanced)
    loss = objective(model, batch)
    weight = objective.weight(batch)
    assert loss.parts.keys() == {"nll", "balance"}
    assert loss.parts["balance"].item() == 0.5 * weight
    assert loss.total.item() == pytest.approx(plain + 0.5 * weight)
