"""Muon: momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

For a hidden matrix W with gradient G, momentum μ and learning rate α:

    M_t = μ M_{t-1} + (1 - μ) G_t
    U_t = (1 - μ) G_t + μ M_t   (Nesterov)   or   M_t
    O_t ≈ the nearest semi-orthogonal matrix to U_t: with U = P Σ Qᵀ it is P Qᵀ, every singular value set to 1
    W_t = (1 - α λ) W_{t-1} - α s O_t

The scale s keeps updates of matrices of different shapes comparable (W has `rows` outputs and `columns` inputs):
- `original`: √max(1, rows / columns), the author's.
- `match_rms_adamw`: 0.2 √max(rows, columns), which gives an update the root mean square of a typical AdamW one, so
  AdamW's learning rate and decay carry over (Liu et al. 2025, arXiv:2502.16982, section 2.2).

O_t comes from an odd polynomial of degree 5, iterated. With X_0 = U / ‖U‖_F and a triple (a, b, c) per iteration,

    X_{k+1} = a X_k + (b A + c A²) X_k,   A = X_k X_kᵀ,

so a singular value σ becomes a σ + b σ³ + c σ⁵. `newton_schulz` repeats the author's triple, which brings singular
values into about [0.7, 1.2]; `polar_express` takes the minimax triple of each iteration (Amsel et al. 2025,
arXiv:2505.16932, algorithm 1), closer to 1 for the same work.

A parameter of three dimensions is a stack of matrices (the experts of a mixture): each is orthogonalised by itself.

Where we differ: matrices of one shape (transposes included) are iterated together as one stack; without hardware for
bfloat16 the iteration runs in float32.

Routers of experts and gates of values are hidden matrices like others; `exclude` leaves them to AdamW.

N matrices in a stack, E experts, R rows, C columns with R ≤ C.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch

from sky_core.errors import ConfigError
from sky_core.training.foreach import ForeachOptimizer
from sky_core.training.groups import Named, describe, is_hidden_matrix, matching
from sky_core.training.precision import bf16_hardware

log = logging.getLogger(__name__)

Triple = tuple[float, float, float]
Iteration = Literal["newton_schulz", "polar_express"]
Scale = Literal["original", "match_rms_adamw"]

EPS = 1e-7
NEWTON_SCHULZ: Triple = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01
"""Rounding may push a singular value above the interval a polynomial was made for; this much slack keeps it inside."""


def coefficients(iteration: Iteration, steps: int) -> list[Triple]:
    """The triple (a, b, c) of each of `steps` iterations."""
    if iteration == "newton_schulz":
        return [NEWTON_SCHULZ] * steps
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return [*safe, *[POLAR_EXPRESS[-1]] * steps][:steps]


def iterate(x_NRC: torch.Tensor, triples: Sequence[Triple]) -> torch.Tensor:
    """The iteration on a stack of wide matrices, in the stack's own type."""
    x_NRC = x_NRC / x_NRC.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for a, b, c in triples:
        gram_NRR = x_NRC @ x_NRC.mT
        polynomial_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, polynomial_NRR, x_NRC, beta=a)
    return x_NRC


def orthogonalize(
    matrices: Sequence[torch.Tensor], triples: Sequence[Triple], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The polynomial approximation of P Qᵀ of each matrix (of each in a stack), computed and returned in `dtype`."""
    stacks: dict[tuple[torch.device, torch.Size], list[int]] = defaultdict(list)
    wide = [matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix for matrix in matrices]
    for index, matrix in enumerate(wide):
        stacks[matrix.device, matrix.shape[-2:]].append(index)
    results: list[torch.Tensor] = list(matrices)
    for (_, shape), indices in stacks.items():
        members = [wide[index].reshape(-1, *shape).to(dtype) for index in indices]
        x_NRC = iterate(torch.cat(members), triples)
        for index, x_ERC in zip(indices, x_NRC.split([len(member) for member in members]), strict=True):
            x = x_ERC.view(wide[index].shape)
            results[index] = x if wide[index] is matrices[index] else x.mT
    return results


def update_scale(shape: Sequence[int], scale: Scale) -> float:
    """What the orthogonalised update of a (rows, columns) matrix, or a stack of these, is multiplied by."""
    rows, columns = shape[-2:]
    return math.sqrt(max(1.0, rows / columns)) if scale == "original" else 0.2 * math.sqrt(max(rows, columns))


def split(parameters: Sequence[Named], exclude: Sequence[str] = ()) -> tuple[list[Named], list[Named]]:
    """(hidden matrices, everything else); a matrix whose name matches `exclude` counts as else.

    Raises `ConfigError` when a pattern matches nothing or no hidden matrix is left.
    """
    excluded = matching(exclude, [name for name, _ in parameters], "optimizer.exclude")
    hidden = [(name, p) for name, p in parameters if is_hidden_matrix(name, p) and name not in excluded]
    names = {name for name, _ in hidden}
    others = [(name, p) for name, p in parameters if name not in names]
    if not hidden:
        raise ConfigError(f"optimizer: muon finds no hidden matrix among {describe(others)}; use adamw")
    log.info("Muon: %s in hidden matrices; AdamW: %s", describe(hidden), describe(others))
    return hidden, others


class Muon(ForeachOptimizer):
    """Muon for hidden matrices and stacks of them. State per parameter: `momentum_buffer`, fp32 like the parameter.

    `lr` is the step before the shape-dependent scale; `weight_decay` is decoupled and not scaled; `steps` counts
    iterations of the polynomial. Raises `ValueError` for a parameter that is no matrix.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.05,
        scale: Scale = "original",
        iteration: Iteration = "newton_schulz",
        steps: int = 5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "scale": scale, "iteration": iteration, "steps": steps})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3):
                    raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(parameter.shape)}")

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]

        torch._foreach_lerp_(momentum, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momentum, group["momentum"]) if group["nesterov"] else momentum
        orthogonal = orthogonalize(
            updates, coefficients(group["iteration"], group["steps"]), iteration_dtype(parameters[0].device)
        )
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for parameter, update in zip(parameters, orthogonal, strict=True):
            parameter.add_(update, alpha=-group["lr"] * update_scale(parameter.shape, group["scale"]))


def iteration_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it: the iteration forgives its rounding, and it is much faster."""
    return torch.bfloat16 if bf16_hardware(device.type, device.index) else torch.float32
