"""A linear layer whose weight is kept in few bits: y = x dequantized(W)ᵀ + b. Activations are not quantised.

Decoding reads every weight for a handful of rows, so bytes are what it costs; a prefill or a training batch reads them
once for many rows, so arithmetic is. Hence two ways to the same product, chosen by the number of rows of x:

- up to `few_rows`: torch's packed kernel, which widens the weights in registers. On x86 it is vectorised for bf16
  activations only (fp32 ones take a scalar loop, ten times slower), so x is rounded to bf16 for it, sums are fp32 and y
  comes back in the dtype of x. Let activations be bf16 (autocast, or `model.bfloat16()`): the casts go away. Compiled
  decoding takes operators of our own in its place for 8 rows and fewer (`sky_core.model.decoding_operators`).
- above, and wherever the kernel is not for the layer (`obstacle`), for the device, or gradients are needed: blocks of
  at most `BLOCK` weights are dequantised in the dtype of x, multiplied, and gone.

The weights hold no gradient; x gets its own, through blocks that are dequantised again in the backward pass, so that
adapters train in front of and behind such layers at the memory of the codes.

M rows of x, K input features, N output features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

BLOCK = 2**20
"""Weights that are dequantised at a time: 2 MB of bf16 stay in a cache; a head of 16,384 x 512 all at once took up to
1.5 (int8) and 2 (int4) times as long."""


class QuantizedLinear(nn.Module, ABC):
    """What stands in for an `nn.Linear`: buffers `codes`, `scales` (see the formats) and, where there was one, `bias`.

    Scales are bf16 whatever the model is, and casting them to a wider type changes no weight.
    """

    few_rows: ClassVar[int]
    """Rows of x up to which the packed kernel is faster, as measured (`docs/log.md`)."""
    panel: int = 1
    """Output features that lie together; a block holds whole panels."""

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.obstacle = self.find_obstacle()
        """Why torch's packed kernel cannot serve this layer on a CPU; None where it does."""

    @abstractmethod
    def find_obstacle(self) -> str | None: ...

    @abstractmethod
    def packed(self, x_MK: torch.Tensor) -> torch.Tensor:
        """y_MN of bf16 rows on a CPU by torch's kernel."""

    @abstractmethod
    def block(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(w_NK, f_N or None): rows start to stop of the weight are f_N w_NK (None: w_NK itself)."""

    @property
    def weight(self) -> torch.Tensor:
        """w_NK as it is multiplied, in fp32 (float64 where the scales are); made anew at each reading."""
        dtype = torch.promote_types(self.scales.dtype, torch.float32)
        return torch.cat([w_NK if f_N is None else w_NK * f_N[:, None] for w_NK, f_N in self.blocks(dtype)])

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        step = max(1, BLOCK // (self.in_features * self.panel)) * self.panel
        for start in range(0, self.out_features, step):
            yield self.block(start, min(start + step, self.out_features), dtype)

    def product(self, x_MK: torch.Tensor) -> torch.Tensor:
        """y_MN by dequantised blocks, in the dtype of x."""
        parts = []
        for w_NK, f_N in self.blocks(x_MK.dtype):
            y_MN = F.linear(x_MK, w_NK)
            parts.append(y_MN if f_N is None else y_MN.mul_(f_N))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def transposed_product(self, y_MN: torch.Tensor) -> torch.Tensor:
        """y W, (M, K): what the gradient of the output is to the input."""
        total_MK, start = y_MN.new_zeros(len(y_MN), self.in_features), 0
        for w_NK, f_N in self.blocks(y_MN.dtype):
            part_MN = y_MN[:, start : start + len(w_NK)]
            total_MK.addmm_(part_MN if f_N is None else part_MN * f_N, w_NK)
            start += len(w_NK)
        return total_MK

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N), in the dtype of x or of the autocast that is on."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x_MK = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and x.requires_grad:
            y_MN = _Product.apply(x_MK.to(dtype), self)
        elif self.obstacle is None and kind == "cpu" and 0 < len(x_MK) <= self.few_rows:
            y_MN = self.packed(x_MK.to(torch.bfloat16)).to(dtype)
        else:
            y_MN = self.product(x_MK.to(dtype))
        y = y_MN.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(x_MK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MN: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.transposed_product(grad_MN), None
