"""Next-token prediction with the auxiliary z-loss of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 5).

    loss = Σ_t  -log p(target_t) + c log² Z_t,    Z_t = Σ_v exp(logit_tv)

The cross entropy does not change when a constant is added to all logits; the second term does, and keeps log Z near 0,
where bf16 is exact. PaLM uses c = 1e-4. Relative to core's `next_token` the logits of a micro-batch are held at once.

N targets, B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import torch

from sky_core.data.dataset import IGNORE, Batch
from sky_core.model.language_model import LanguageModel
from sky_core.training.objective import Loss, Objective


class ZLossObjective(Objective):
    """Cross entropy plus `coefficient` times log² Z, summed over the targets (nats)."""

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        self.coefficient = coefficient

    def forward(self, model: LanguageModel, batch: Batch) -> Loss:
        hidden_BTD = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        carried = batch.targets_BT != IGNORE
        targets_N = batch.targets_BT[carried]
        logits_NV = model.logits(hidden_BTD[carried][None])[0].float()
        log_z_N = torch.logsumexp(logits_NV, dim=-1)
        nll = (log_z_N - logits_NV.gather(1, targets_N[:, None])[:, 0]).sum()
        z_loss = self.coefficient * log_z_N.square().sum()
        return Loss(nll + z_loss, {"nll": nll.detach(), "z_loss": z_loss.detach()})
