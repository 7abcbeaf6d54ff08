"""GEGLU: a feed-forward layer whose hidden units are gated (Shazeer 2020, arXiv:2002.05202, equation 5).

    y = W_down (gelu(W_gate x) * W_up x)

Where we differ from the paper: biases follow the model's `bias`.

B batch, T time, D model width.
"""

from __future__ import annotations

import torch
from torch import nn

from sky_core.model.context import Context
from sky_core.slots import LayerSpec


class GatedFeedForward(nn.Module):
    """One half of the hidden units gates the other."""

    def __init__(self, spec: LayerSpec, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.d_model, d_ff, bias=spec.bias)
        self.up_proj = nn.Linear(spec.d_model, d_ff, bias=spec.bias)
        self.down_proj = nn.Linear(d_ff, spec.d_model, bias=spec.bias)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
