"""Normalisation over the last dimension.

LayerNorm (Ba et al. 2016, arXiv:1607.06450):  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467):  y = x / sqrt(mean(x²) + eps) * gain

The gain of RMSNorm is `weight`, learned around one; or 1 + `weight`, learned around zero, so that weight decay pulls
towards no gain (Gemma); or there is none (nanochat: the matrix behind the norm can learn it).

Both compute in at least fp32, whatever the dtype of x, and return the dtype of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class LayerNorm(nn.Module):
    """Zero mean and unit variance, then a learned gain and (optionally) bias."""

    def __init__(self, dim: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else _wide(self.bias)
        return F.layer_norm(_wide(x), self.weight.shape, _wide(self.weight), bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Unit root mean square, then a learned gain (around "one", around "zero", or "none")."""

    def __init__(self, dim: int, eps: float, gain: str = "one") -> None:
        super().__init__()
        self.dim, self.eps, self.start = dim, eps, 1.0 if gain == "one" else 0.0
        self.offset = 1.0 if gain == "zero" else 0.0
        self.weight = None if gain == "none" else nn.Parameter(torch.full((dim,), self.start))

    def init_weights(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, self.start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = None if self.weight is None else _wide(self.weight) + self.offset
        return F.rms_norm(_wide(x), (self.dim,), gain, self.eps).to(x.dtype)
