"""What the trainer knows of a loss: a sum, a weight to divide it by, and named parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sky_core.data.dataset import Batch
    from sky_core.model.language_model import LanguageModel


@dataclass
class Loss:
    """The loss of one micro-batch.

    `total` is a scalar *sum*; the trainer divides it by the weight of the whole step (all micro-batches, all ranks),
    so accumulation gives the gradient of one large batch whatever the masks. `parts` are further sums to log,
    divided by the same weight.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """Turns (model, batch) into a `Loss`. A module, so that a teacher's projection or a value head can be trained:
    its trainable parameters join the optimizer and its state dict the checkpoint. Frozen models it holds do not
    belong in its state dict: keep them in a plain attribute, outside of module registration, and move them to the
    device of the first batch.
    """

    def prepare(self, model: LanguageModel, batch: Batch) -> Batch:
        """Called once per micro-batch without gradients, before any forward pass of the step.

        Rollouts, reference log-probabilities and teacher signals are made here; the default returns the batch.
        """
        return batch

    def weight(self, batch: Batch) -> float:
        """What `total` is to be divided by, in the unit of its sum; the default counts target tokens."""
        return batch.n_targets()

    def forward(self, model: LanguageModel, batch: Batch) -> Loss:
        raise NotImplementedError


class NextToken(Objective):
    """Next-token prediction: the summed negative log-likelihood of the targets.

    Auxiliary losses that layers report (means over tokens) are added at the weight of the batch's tokens.
    """

    def forward(self, model: LanguageModel, batch: Batch) -> Loss:
        collect: dict[str, Any] = {}
        hidden_BTD = model.hidden(
            batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT, collect=collect
        )
        nll = model.nll(hidden_BTD, batch.targets_BT)
        losses = {name: value * self.weight(batch) for name, value in collect.get("losses", {}).items()}
        if not losses:
            return Loss(nll)
        parts = {"nll": nll, **losses}
        return Loss(sum(parts.values()), {name: value.detach() for name, value in parts.items()})
