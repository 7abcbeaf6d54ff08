"""Linear layers in 8-bit floating point (Micikevicius et al. 2022, arXiv:2209.05433), with a scale for each tensor.

    q(z; c)  = c(z / s_z), s_z = max|z| / max(c)     rounded to the format c; the largest number becomes c's largest
    y_NM     = s_x s_w  q(x; e4m3) q(w; e4m3)ᵀ
    dx_NK    = s_g s_w  q(g; e5m2) q(w; e4m3)        gradients take the format of wider range
    dw_MK    = s_g s_x  q(g; e5m2)ᵀ q(x; e4m3)

Where we differ from the paper: a scale is that of the tensor as it is ("dynamic"), not one predicted from earlier
steps: no history is kept, and a step depends on its own numbers alone. Weights, gradients of weights and optimizer
state stay fp32, everything but these products runs as under bf16, and products accumulate in fp32. Heads, routers and
gates are no plain linear layers of a block and stay as they are, as do layers whose widths are no multiples of 16.

N rows (tokens), K inputs, M outputs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sky_core.errors import ConfigError

log = logging.getLogger(__name__)

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What the hardware wants the sides of each matrix to be multiples of."""


def require_fp8(device: torch.device) -> None:
    """Raise `ConfigError` unless this device multiplies fp8 matrices."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        here = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ConfigError(
            "train.precision: fp8 needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), here"
            f" is {here}; use auto"
        )


def use_fp8(layers: nn.Module) -> int:
    """Have the plain linear layers inside `layers` multiply in fp8; returns how many. Names and weights stay."""
    linears = [module for module in layers.modules() if type(module) is nn.Linear]
    fit = [one for one in linears if one.in_features % MULTIPLE == 0 and one.out_features % MULTIPLE == 0]
    for linear in fit:
        linear.__class__ = Fp8Linear
    log.info("fp8: %d of %d linear layers in the blocks", len(fit), len(linears))
    return len(fit)


class Fp8Linear(nn.Linear):
    """A linear layer whose three products are made in fp8; in bf16 where the rows are no multiple of 16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_NK = x.flatten(0, -2)
        if len(x_NK) % MULTIPLE:
            return F.linear(x, self.weight, self.bias)
        y_NM: torch.Tensor = _Product.apply(x_NK.bfloat16(), self.weight)
        y = y_NM.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """y_NM = x_NK w_MKᵀ in bf16, of factors in fp8."""

    @staticmethod
    def forward(ctx: Any, x_NK: torch.Tensor, w_MK: torch.Tensor) -> torch.Tensor:
        x8_NK, x_scale = quantize(x_NK, FORWARD)
        w8_MK, w_scale = quantize(w_MK, FORWARD)
        ctx.save_for_backward(x8_NK, x_scale, w8_MK, w_scale)
        return scaled_product(x8_NK, w8_MK, x_scale, w_scale, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x8_NK, x_scale, w8_MK, w_scale = ctx.saved_tensors
        g8_NM, g_scale = quantize(gradients[0], BACKWARD)
        dx_NK = dw_MK = None
        if ctx.needs_input_grad[0]:
            dx_NK = scaled_product(g8_NM, w8_MK.T.contiguous(), g_scale, w_scale, torch.bfloat16)
        if ctx.needs_input_grad[1]:
            dw_MK = scaled_product(g8_NM.T.contiguous(), x8_NK.T.contiguous(), g_scale, x_scale, torch.float32)
        return dx_NK, dw_MK


def quantize(z: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(z / s in `kind`, the fp32 scalar s) with the largest number of z at the largest of `kind`."""
    largest = torch.finfo(kind).max
    scale = z.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny * largest) / largest
    return (z.float() / scale).clamp(-largest, largest).to(kind), scale


def scaled_product(
    a_IK: torch.Tensor, b_JK: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """s_a s_b a bᵀ: the hardware wants the first factor by rows and the second by columns."""
    product: torch.Tensor = torch._scaled_mm(a_IK, b_JK.T, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype)
    return product
