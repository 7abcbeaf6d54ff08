"""8 bits a weight, one scale for each output feature.

    s_n = max_k |W_nk| / 127,    q_nk = round(W_nk / s_n) in -127..127,    W_nk ≈ s_n q_nk

Dettmers et al. 2022, LLM.int8() (arXiv:2208.07339), equation 5 and section 2.1: absmax quantisation, row by row.
Where we differ: activations stay as they are (weight only), so no outlier features are set apart; s is rounded to bf16
before W is divided by it, because torch's kernel reads bf16 scales: then that rounding is no error of its own, and
every way to the product multiplies the same matrix. The largest weight lies at 127 (1 ± 2^-8) s then, so no weight is
further than half a step from its code.

The codes are whole numbers that bf16 holds, so s can be multiplied to the output, and a block of weights needs a cast
only.

M rows of x, K input features, N output features.
"""

from __future__ import annotations

import platform

import torch
from torch import nn

from sky_core.quantization.linear import QuantizedLinear

LEVELS = 127
VECTOR = 16
"""Numbers that the packed kernel reads at a time, aligned; it does not look for the end of a row in between."""


def quantize_rows(w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 (N, K), scales fp32 (N)) of finite weights."""
    w_NK = w_NK.float()
    scales_N = (w_NK.abs().amax(1) / LEVELS).bfloat16().float()
    scales_N = torch.where(scales_N == 0, 1.0, scales_N)
    return (w_NK / scales_N[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8), scales_N


class Int8Linear(QuantizedLinear):
    """`codes` int8 (N, K), `scales` (N)."""

    # One row to 8: 1.3 to 4 times the speed of bf16; 16: as fast as a block's cast and product; 32: 1.4 times slower.
    few_rows = 16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        codes_NK, scales_N = quantize_rows(linear.weight.detach())
        self.register_buffer("codes", codes_NK)
        self.register_buffer("scales", scales_N.bfloat16())

    def find_obstacle(self) -> str | None:
        if torch.backends.cpu.get_cpu_capability() == "DEFAULT" and platform.machine() not in ("aarch64", "arm64"):
            return "this CPU has neither AVX2 nor AVX-512"
        if self.in_features % VECTOR:
            return f"their in_features are no multiple of {VECTOR}"
        return None

    def packed(self, x_MK: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and x_MK.storage_offset() % VECTOR:
            x_MK = x_MK.clone()  # it reads with aligned loads; what compiled code computes is aligned
        return torch.ops.aten._weight_int8pack_mm(x_MK.contiguous(), self.codes, self.scales.to(torch.bfloat16))

    def block(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return self.codes[start:stop].to(dtype), self.scales[start:stop].to(dtype)
