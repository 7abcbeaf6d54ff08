"""Mixture of experts: each token passes a few of many feed-forward parts (Shazeer et al. 2017, arXiv:1701.06538).

    y = Σ_{e chosen} w_e FFN_e(x) + FFN_shared(x),    FFN_e(x) = W_down,e (act(W_gate,e x) * W_up,e x)

The choice and w are the router's (`sky_core.model.router`); shared experts are those that every token passes, as one
part of their joint width (Dai et al. 2024, DeepSeekMoE, arXiv:2401.06066, section 3.2). No capacity, no dropped tokens
(Gale et al. 2022, MegaBlocks, arXiv:2211.15841): the N top_k rows are sorted by expert, pass grouped matrix products
and go back to their tokens by the inverse permutation, where the reference codes add them up expert by expert: no loop,
and sums in one order on every device.

Relative to the papers: experts, router and shared experts have no biases, whatever the model's `bias`. Padding
(`ctx.valid_BT`) passes as other tokens do, without effect on them, and counts in no load and no loss.

The start values of all of them are those of linear layers, drawn by `sky_core.model.init`: a module called `experts`
holds matrices in stacks.

B batch, T time, N = B T tokens, D model width, E experts, K = top_k, R = N K rows, F hidden units of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from sky_core.model.context import Context
from sky_core.model.feedforward import GatedMLP
from sky_core.model.grouped import grouped_linear
from sky_core.model.router import Router, load_balancing_loss, loads, z_loss
from sky_core.slots import LayerSpec

Activation = Callable[[torch.Tensor], torch.Tensor]


class Experts(nn.Module):
    """Gated feed-forward parts stacked along the first dimension: `gate_proj`, `up_proj` EFD, `down_proj` EDF."""

    def __init__(self, spec: LayerSpec, n_experts: int, d_ff: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Parameter(torch.empty(n_experts, d_ff, spec.d_model))
        self.up_proj = nn.Parameter(torch.empty(n_experts, d_ff, spec.d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, spec.d_model, d_ff))

    def forward(self, x_RD: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        """y_RD of rows in the order of their experts; `offsets_E` is where the rows of each expert end."""
        gate_RF = self.activation(grouped_linear(x_RD, self.gate_proj, offsets_E))
        up_RF = grouped_linear(x_RD, self.up_proj, offsets_E)
        return grouped_linear(gate_RF * up_RF, self.down_proj, offsets_E)


class MixtureOfExperts(nn.Module):
    """Router, experts and shared experts as the feed-forward part of a layer.

    `idle_parameters` counts those that a token does not pass. In training `load` counts the tokens of each expert since
    the last `after_step`: every forward pass with gradients, so activation checkpointing, which runs each layer twice,
    doubles them all alike and changes neither the bias's sign rule nor a ratio of loads.
    """

    load: torch.Tensor

    def __init__(
        self,
        spec: LayerSpec,
        router: Router,
        d_ff: int,
        activation: Activation,
        *,
        n_shared: int = 0,
        aux_loss: float = 0.0,
        z_loss: float = 0.0,
        bias_update: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_experts, self.top_k = router.out_features, router.top_k
        self.aux_loss, self.z_loss, self.bias_update = aux_loss, z_loss, bias_update
        self.idle_parameters = (self.n_experts - self.top_k) * 3 * spec.d_model * d_ff
        self.gate = router
        self.experts = Experts(spec, self.n_experts, d_ff, activation)
        self.shared_experts = GatedMLP(replace(spec, bias=False), n_shared * d_ff, activation) if n_shared else None
        self.register_buffer("load", torch.zeros(self.n_experts, dtype=torch.long), persistent=False)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        x_ND = x_BTD.flatten(0, 1)
        valid_N = None if ctx.valid_BT is None else ctx.valid_BT.flatten()
        routing = self.gate.choose(self.gate(x_ND))
        if self.training and torch.is_grad_enabled():
            load_E = loads(routing.experts_NK, self.n_experts, valid_N)
            self.load += load_E
            if self.aux_loss:
                ctx.add_loss("aux_loss", self.aux_loss * load_balancing_loss(routing, load_E, valid_N))
            if self.z_loss:
                ctx.add_loss("z_loss", self.z_loss * z_loss(routing, valid_N))

        order_R = routing.experts_NK.flatten().argsort(stable=True)
        offsets_E = loads(routing.experts_NK, self.n_experts).cumsum(0).int()
        y_RD = self.experts(x_ND[order_R // self.top_k], offsets_E)
        y_NKD = y_RD[order_R.argsort()].unflatten(0, (-1, self.top_k))
        y_ND = (routing.weights_NK[..., None] * y_NKD).sum(1).to(y_RD.dtype)
        y_BTD = y_ND.unflatten(0, x_BTD.shape[:2])
        return y_BTD if self.shared_experts is None else y_BTD + self.shared_experts(x_BTD, ctx)

    @torch.no_grad()
    def after_step(
        self, sum: Callable[[torch.Tensor], torch.Tensor], *, skipped: bool = False
    ) -> dict[str, torch.Tensor]:
        """Balance the experts by their loads in this step, those of all processes together (`sum`), and count anew.

        Returns `max_violation`, how far the busiest expert lies above the mean load, relative to it (arXiv:2408.15664,
        section 4.1). Does nothing to the bias of a frozen router, nor when the step was `skipped`.
        """
        load_E = sum(self.load.clone()).double()
        self.load.zero_()
        mean = load_E.mean()
        bias_E = self.gate.e_score_correction_bias
        if bias_E is not None and not skipped and self.gate.weight.requires_grad:
            bias_E += self.bias_update * torch.sign(mean - load_E)
        return {"max_violation": load_E.max() / mean.clamp(min=1) - 1}
