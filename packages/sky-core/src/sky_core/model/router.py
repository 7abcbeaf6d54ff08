"""Which experts a token goes to, and with what weight.

    l = W x                                          in at least fp32
    s = softmax(l)                                   softmax: Mixtral (arXiv:2401.04088, section 2.1), Qwen3
    s = sigmoid(l)                                   sigmoid: DeepSeek-V3 (arXiv:2412.19437, equations 13 to 16)
    chosen = the top_k experts by s + b              b: a bias that only the choice sees (balancing, below)
    w = s[chosen], divided by their sum (norm_topk), times routed_scale

With groups (DeepSeek-V3, section 2.1.2, node-limited routing) the experts lie in n_groups equal groups, a group scores
the sum of its two best s + b, and only the experts of the best top_groups groups can be chosen: the others count as
-inf, not 0, which a negative s + b would lose against.

Balancing, three ways that may be combined, f_e = tokens that chose e / tokens:
- `load_balancing_loss` = E Σ_e f_e P_e, P_e the mean of s_e over tokens (Fedus et al. 2021, Switch, arXiv:2101.03961,
  equations 4 to 6); for top_k > 1 as `transformers` has it: top_k when balanced. Sigmoid scores are divided by their
  sum over the experts first (DeepSeek-V3, equation 19).
- `z_loss` = mean of logsumexp(l)² (Zoph et al. 2022, ST-MoE, arXiv:2202.08906, equation 5): keeps logits small.
- no loss: b_e += u sign(mean load - load_e) after each optimizer step (Wang et al. 2024, arXiv:2408.15664, section 3).
  u has to be small against what scores of one expert differ by between tokens, or tokens change sides in a body.

Softmax goes over all experts before the choice; with norm_topk that equals Mixtral's softmax over the chosen logits.

N tokens, D model width, E experts, G groups, K = top_k.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

TINY = 1e-20
"""Keeps the sum of sigmoid scores that all rounded to 0 from dividing by 0, as in DeepSeek's code."""


class Routing(NamedTuple):
    """What the router decided for N tokens."""

    logits_NE: torch.Tensor
    scores_NE: torch.Tensor
    weights_NK: torch.Tensor
    experts_NK: torch.Tensor


class Router(nn.Linear):
    """Logits of every expert by a linear map, and the choice by them. `weight` is (E, D).

    `e_score_correction_bias` (E) is the bias b; absent (None) where nothing balances by it.
    """

    e_score_correction_bias: torch.Tensor | None

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        top_k: int,
        score: Literal["softmax", "sigmoid"],
        norm_topk: bool,
        n_groups: int = 1,
        top_groups: int = 1,
        routed_scale: float = 1.0,
        correction_bias: bool = False,
    ) -> None:
        super().__init__(d_model, n_experts, bias=False)
        self.top_k, self.score, self.norm_topk = top_k, score, norm_topk
        self.n_groups, self.top_groups, self.routed_scale = n_groups, top_groups, routed_scale
        self.register_buffer("e_score_correction_bias", torch.zeros(n_experts) if correction_bias else None)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """logits_NE, in fp32 also under autocast: a choice flips on a rounding error."""
        with torch.autocast(x_ND.device.type, enabled=False):
            dtype = torch.promote_types(x_ND.dtype, torch.float32)
            return F.linear(x_ND.to(dtype), self.weight.to(dtype))

    def choose(self, logits_NE: torch.Tensor) -> Routing:
        """The experts of each token and their weights."""
        scores_NE = logits_NE.softmax(-1) if self.score == "softmax" else logits_NE.sigmoid()
        choice_NE = scores_NE.detach()
        if self.e_score_correction_bias is not None:
            choice_NE = choice_NE + self.e_score_correction_bias
        if self.top_groups < self.n_groups:
            choice_NE = self._within_groups(choice_NE)
        experts_NK = choice_NE.topk(self.top_k, dim=-1).indices
        weights_NK = scores_NE.gather(-1, experts_NK)
        if self.norm_topk:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + TINY)
        return Routing(logits_NE, scores_NE, weights_NK * self.routed_scale, experts_NK)

    def _within_groups(self, choice_NE: torch.Tensor) -> torch.Tensor:
        choice_NGM = choice_NE.unflatten(-1, (self.n_groups, -1))
        scores_NG = choice_NGM.topk(2, dim=-1).values.sum(-1)
        best_NG = scores_NG.topk(self.top_groups, dim=-1).indices
        allowed_NG = torch.zeros_like(scores_NG, dtype=torch.bool).scatter(-1, best_NG, True)
        return choice_NGM.masked_fill(~allowed_NG[..., None], -torch.inf).flatten(-2)


def loads(experts_NK: torch.Tensor, n_experts: int, valid_N: torch.Tensor | None = None) -> torch.Tensor:
    """load_E: how many (valid) tokens chose each expert, int64."""
    one_NK = torch.ones_like(experts_NK)
    if valid_N is not None:
        one_NK = one_NK * valid_N[:, None]
    return one_NK.new_zeros(n_experts).scatter_add(0, experts_NK.flatten(), one_NK.flatten())


def load_balancing_loss(routing: Routing, load_E: torch.Tensor, valid_N: torch.Tensor | None = None) -> torch.Tensor:
    """E Σ_e f_e P_e over the (valid) tokens: top_k when the load is even, more the less it is."""
    scores_NE = routing.scores_NE
    shares_NE = scores_NE / (scores_NE.sum(-1, keepdim=True) + TINY)
    mean_E = _mean(shares_NE, valid_N)
    tokens = load_E.sum().clamp(min=1) / routing.experts_NK.shape[1]
    return len(load_E) * (load_E / tokens * mean_E).sum()


def z_loss(routing: Routing, valid_N: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over the (valid) tokens of logsumexp(logits)²."""
    return _mean(routing.logits_NE.logsumexp(-1).square(), valid_N)


def _mean(values_N: torch.Tensor, valid_N: torch.Tensor | None) -> torch.Tensor:
    """The mean over the (valid) rows; 0 when there is none."""
    if valid_N is None:
        return values_N.sum(0) / max(len(values_N), 1)
    weight_N = valid_N.to(values_N.dtype)
    return torch.tensordot(weight_N, values_N, 1) / weight_N.sum().clamp(min=1)
