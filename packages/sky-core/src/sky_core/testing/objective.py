"""The contract of an objective: sums and weights that add up, padding that is ignored, a loss that can be learned.

B batch, T time (tokens).
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from sky_core.data.dataset import IGNORE, Batch
from sky_core.model.language_model import LanguageModel
from sky_core.slots import Objective
from sky_core.testing.component import ComponentContract
from sky_core.testing.workbench import (
    TinyDataset,
    assert_close,
    assert_same_weights,
    tiny_model,
    tiny_run,
    tiny_tokenizer,
    weights,
)
from sky_core.tokenizer.base import Tokenizer
from sky_core.training.objective import Loss
from sky_core.training.objective import Objective as BuiltObjective

LENGTHS = (16, 3, 9, 12)
"""Real tokens of the batch's rows."""


class ObjectiveContract(ComponentContract):
    """An objective. Override `batch` when it needs more than tokens and targets."""

    base = Objective
    learns: ClassVar[bool] = True
    """Its loss per weight falls by `fall` in `steps` steps on one batch (rewards may not)."""
    steps: ClassVar[int] = 40
    fall: ClassVar[float] = 0.3
    separable: ClassVar[bool] = True
    """The loss of a batch is the sum over its rows (contrastive losses are not)."""

    @pytest.fixture(autouse=True)
    def _built(self) -> None:
        """A fresh model and objective for every test."""
        self.tokenizer = tiny_tokenizer()
        self.model = self.make_model(self.tokenizer)
        torch.manual_seed(0)
        self.objective: BuiltObjective = self.component.build(tiny_run(), self.tokenizer).eval()

    def make_model(self, tokenizer: Tokenizer) -> LanguageModel:
        """The model to train, seeded."""
        return tiny_model(tokenizer.vocab_size)

    def batch(self, tokenizer: Tokenizer) -> Batch:
        """Four rows, right-padded after `LENGTHS` tokens."""
        batch = TinyDataset(tokenizer).batch(0, len(LENGTHS))
        for row, length in enumerate(LENGTHS):
            batch.targets_BT[row, length - 1 :] = IGNORE
        return batch

    def prepared(self) -> Batch:
        torch.manual_seed(1)
        with torch.no_grad():
            return self.objective.prepare(self.model, self.batch(self.tokenizer))

    def loss(self, batch: Batch) -> Loss:
        torch.manual_seed(2)
        return self.objective(self.model, batch)

    def gradients(self, *batches: Batch) -> list[torch.Tensor]:
        """Gradients of model and objective accumulated over micro-batches, as the trainer does it."""
        trained = [p for p in [*self.model.parameters(), *self.objective.parameters()] if p.requires_grad]
        weight = sum(self.objective.weight(batch) for batch in batches)
        total = [torch.zeros_like(p) for p in trained]
        for batch in batches:
            loss = self.loss(batch).total / max(weight, 1.0)
            parts = torch.autograd.grad(loss, trained, allow_unused=True)
            total = [old if part is None else old + part for old, part in zip(total, parts, strict=True)]
        return total

    def test_the_loss_is_a_finite_scalar_with_named_parts(self) -> None:
        loss = self.loss(self.prepared())
        assert loss.total.ndim == 0
        assert loss.total.isfinite()
        assert all(part.ndim == 0 and part.isfinite() and not part.requires_grad for part in loss.parts.values())
        assert "loss" not in loss.parts, "the trainer logs the total under this name"

    def test_gradients_reach_the_model_and_the_objective(self) -> None:
        gradients = self.gradients(self.prepared())
        assert all(gradient.isfinite().all() for gradient in gradients)
        own = sum(p.requires_grad for p in self.objective.parameters())
        assert any(gradient.any() for gradient in gradients[: len(gradients) - own]), "the model learns nothing"
        assert all(gradient.any() for gradient in gradients[len(gradients) - own :]), "a parameter of its own is idle"

    def test_weights_add_up_over_rows(self) -> None:
        batch = self.prepared()
        assert self.objective.weight(batch) == sum(self.objective.weight(batch.rows(i, i + 1)) for i in range(4)) > 0

    @pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1], [2, 2]], ids=str)
    def test_micro_batches_give_the_gradient_of_the_whole(self, sizes: list[int]) -> None:
        if not self.separable:
            pytest.skip("separable = False: rows are compared with each other")
        batch, start = self.prepared(), 0
        parts = [batch.rows(start := sum(sizes[:i]), start + size) for i, size in enumerate(sizes)]
        for actual, expected in zip(self.gradients(*parts), self.gradients(batch), strict=True):
            assert_close(actual, expected, 1e-5)  # fp32 sums in another order

    def test_tokens_after_the_last_target_do_not_count(self) -> None:
        batch = self.prepared()
        changed = batch.tokens_BT.clone()
        for row, targets_T in enumerate(batch.targets_BT):
            last = int((targets_T != IGNORE).nonzero().max()) if (targets_T != IGNORE).any() else -1
            changed[row, last + 1 :] = 65
        other = Batch(changed, batch.targets_BT, batch.documents_BT, batch.positions_BT, batch.extra)
        assert_close(self.loss(other).total, self.loss(batch).total, 1e-6)

    def test_a_fully_masked_batch_gives_zeros_and_no_nan(self) -> None:
        batch = self.prepared()
        batch.targets_BT.fill_(IGNORE)
        assert self.objective.weight(batch) == 0
        assert self.loss(batch).total == 0
        assert all(not gradient.any() for gradient in self.gradients(batch))

    def test_one_batch_can_be_learned(self) -> None:
        if not self.learns:
            pytest.skip("learns = False: the loss need not fall")
        trained = [p for p in [*self.model.parameters(), *self.objective.parameters()] if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        losses = []
        for _ in range(self.steps):
            batch = self.prepared()
            loss = self.loss(batch).total / self.objective.weight(batch)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < (1 - self.fall) * losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}"

    def test_preparing_changes_nothing_but_the_batch(self) -> None:
        before, modes = weights(self.model), [module.training for module in self.model.modules()]
        given = self.batch(self.tokenizer)
        tokens_BT = given.tokens_BT.clone()
        with torch.no_grad():
            batch = self.objective.prepare(self.model, given)
        assert torch.equal(given.tokens_BT, tokens_BT)
        assert not any(tensor.requires_grad for tensor in batch.extra.values())
        assert [module.training for module in self.model.modules()] == modes
        assert_same_weights(self.model, before)

    def test_a_seed_gives_the_same_loss_again(self) -> None:
        assert torch.equal(self.loss(self.prepared()).total, self.loss(self.prepared()).total)

    def test_its_state_holds_what_it_trains_and_no_frozen_model(self) -> None:
        frozen = [name for name, parameter in self.objective.named_parameters() if not parameter.requires_grad]
        assert not frozen, f"keep frozen models in a plain attribute: {frozen[:3]}"
        state = weights(self.objective)
        self.objective.load_state_dict(state)
        assert_same_weights(self.objective, state)

    def test_bf16_autocast_is_finite(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert self.loss(self.prepared()).total.isfinite()
