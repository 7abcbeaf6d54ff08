"""What the trainer knows of a loss: a sum, a weight to divide it by, and named parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sky_core.data.dataset import IGNORE
from sky_core.errors import UserError

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
        parts = {"nll": model.nll(hidden_BTD, batch.targets_BT), **self.further(model, batch, hidden_BTD, collect)}
        parts |= {name: value * self.weight(batch) for name, value in collect.get("losses", {}).items()}
        if len(parts) == 1:
            return Loss(parts["nll"])
        return Loss(sum(parts.values()), {name: value.detach() for name, value in parts.items()})

    def further(
        self, model: LanguageModel, batch: Batch, hidden_BTD: torch.Tensor, collect: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Further parts of the loss, as sums; what layers report on the way goes to `collect`."""
        return {}


class MultiToken(NextToken):
    """Next-token prediction plus, for each of the model's `n_mtp` modules, the token one further ahead.

    DeepSeek-V3 (arXiv:2412.19437), equations 24 and 25: loss = nll + weight / n_mtp Σ_k nll_k. Raises `UserError` when
    the model has no such module.
    """

    def __init__(self, mtp_weight: float) -> None:
        super().__init__()
        self.mtp_weight = mtp_weight

    def further(
        self, model: LanguageModel, batch: Batch, hidden_BTD: torch.Tensor, collect: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        if model.n_mtp == 0:
            raise UserError("objective multi_token: the model has no module to predict further tokens; set model.n_mtp")
        parts: dict[str, torch.Tensor] = {}
        tokens_BT, targets_BT, documents_BT = batch.tokens_BT, batch.targets_BT, batch.documents_BT
        for depth in range(model.n_mtp):
            # One token further on: behind the last there is none, and another document's says nothing about this one.
            tokens_BT, targets_BT = tokens_BT.roll(-1, dims=1), targets_BT.roll(-1, dims=1)
            targets_BT[:, -1] = IGNORE
            if documents_BT is not None and batch.documents_BT is not None:
                documents_BT = documents_BT.roll(-1, dims=1)
                targets_BT = targets_BT.masked_fill(documents_BT != batch.documents_BT, IGNORE)
            hidden_BTD = model.mtp_hidden(
                depth,
                hidden_BTD,
                tokens_BT,
                positions_BT=batch.positions_BT,
                documents_BT=batch.documents_BT,
                collect=collect,
            )
            parts[f"nll_{depth + 2}"] = model.nll(hidden_BTD, targets_BT) * (self.mtp_weight / model.n_mtp)
        return parts
