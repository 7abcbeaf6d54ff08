"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2).

    m_t = β₁ m_{t-1} + (1 - β₁) g_t                      first moment, `exp_avg`
    v_t = β₂ v_{t-1} + (1 - β₂) g_t²                     second moment, `exp_avg_sq`
    m̂_t = m_t / (1 - β₁ᵗ),   v̂_t = v_t / (1 - β₂ᵗ)       bias corrections
    θ_t = θ_{t-1} - α_t λ θ_{t-1} - α_t m̂_t / (√v̂_t + ε)

α_t is the scheduled learning rate. As in torch (and unlike the paper, whose schedule η_t multiplies α and λ apart),
the decay is α_t λ, and it is applied before the update.

`AdamW` below is that text in batched tensor operations. `build_adamw` chooses between it and torch's one-pass kernel,
which computes the same numbers up to rounding and is several times faster because it reads each tensor once.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any, Literal

import torch

from sky_core.training.foreach import EagerOptimizer, ForeachOptimizer

log = logging.getLogger(__name__)


class AdamW(ForeachOptimizer):
    """AdamW in the open. State per parameter: `step`, `exp_avg`, `exp_avg_sq`, as torch names them."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        steps, m, v = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))
        gradients = [parameter.grad for parameter in parameters]
        lr, (beta1, beta2) = group["lr"], group["betas"]

        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)

        counts = [step.item() for step in steps]  # each parameter counts its own updates: it may have sat some out
        denominators = torch._foreach_sqrt(v)
        torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in counts])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, m, denominators, [-lr / (1 - beta1**t) for t in counts])


class FusedAdamW(EagerOptimizer, torch.optim.AdamW):
    """torch's AdamW, for its one-pass kernel (`fused=True`). State as above."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def build_adamw(
    groups: list[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    fused: bool | Literal["auto"] = "auto",
) -> torch.optim.Optimizer:
    """AdamW over `groups`: each holds (name, parameter) pairs under `params` and its own `weight_decay`.

    `fused` true is torch's kernel, false is `AdamW` above, "auto" is torch's kernel where every parameter is of a type
    and on a device that has it. Both keep the same state, so a checkpoint moves between them.
    """
    if fused == "auto":
        fused = all(
            p.is_floating_point() and p.device.type in ("cpu", "cuda") for group in groups for _, p in group["params"]
        )
    log.info("AdamW: %s", "torch's fused kernel" if fused else "written out (not fused)")
    if fused:
        return FusedAdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return AdamW(groups, lr=lr, betas=betas, eps=eps)
