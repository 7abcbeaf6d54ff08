"""The position-wise feed-forward part of a layer.

    FFN(x) = W_down act(W_up x)                          (Vaswani et al. 2017, section 3.3; act = ReLU there)
    GLU(x) = W_down (act(W_gate x) * W_up x)             (Shazeer 2020, arXiv:2002.05202, equation 6: SwiGLU has
                                                          act = silu, GEGLU has act = gelu)

act: gelu (Hendrycks & Gimpel 2016), relu, relu2 = relu(x)² (So et al. 2021, Primer, arXiv:2109.08668).

B batch, T time, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from sky_core.model.context import Context
from sky_core.slots import LayerSpec


def relu2(x: torch.Tensor) -> torch.Tensor:
    """relu(x)²."""
    return F.relu(x).square()


class MLP(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, spec: LayerSpec, d_ff: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.up_proj = nn.Linear(spec.d_model, d_ff, bias=spec.bias)
        self.down_proj = nn.Linear(d_ff, spec.d_model, bias=spec.bias)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x_BTD)))


class GatedMLP(nn.Module):
    """SwiGLU and its kin: one half of the hidden units gates the other."""

    def __init__(self, spec: LayerSpec, d_ff: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(spec.d_model, d_ff, bias=spec.bias)
        self.up_proj = nn.Linear(spec.d_model, d_ff, bias=spec.bias)
        self.down_proj = nn.Linear(d_ff, spec.d_model, bias=spec.bias)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


def gated_width(d_model: int) -> int:
    """Hidden units for as many weights as an ungated part of 4 d_model has: 8/3 d_model, up to the next 64."""
    return -(-8 * d_model // (3 * 64)) * 64
