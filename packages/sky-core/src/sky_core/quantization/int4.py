"""4 bits a weight, a scale and an offset for each group of input features of an output feature.

    s = (max W - min W) / 15,    z = min W + 8 s,    q = round((W - z) / s) + 8 in 0..15,    W ≈ s (q - 8) + z

over groups of G = 32 neighbours in a row, min and max taken over the group and 0. Group-wise affine rounding as in
GPTQ (Frantar et al. 2022, arXiv:2210.17323, section 4, "grouping"; `quant.py` of its code), without its correction of
later columns, which needs data. Where we differ: z is a number, not a multiple of s, as torch's kernel wants it: the
largest and the smallest weight are met, 0 need not be. Both are rounded to bf16 before codes are chosen, because that
kernel reads bf16; with 0 in its range a group's ends move by less than 0.1 s in this, so no weight is further than
half a step from its code. At G = 32 a weight takes 4 + 32 / 32 bits.

`codes` lie in memory as torch's kernel for this CPU reads them: panels of P output features (64 with AVX-512, 32 with
AVX2), in each for every input feature P / 2 bytes, byte i with feature i in its low half and feature P / 2 + i in its
high half; output features are filled up with zeros to whole panels. What a kernel reads is asked from torch, once. In a
state dict they are what no CPU decides: uint8 (N, K / 2), the even input feature in the low half.

M rows of x, K input features, N output features, G input features of a group, P output features of a panel.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sky_core.quantization.linear import QuantizedLinear

TOP, MIDDLE = 15, 8
PANEL = 64
"""P where torch has no kernel."""
GROUPS = (32, 64, 128, 256)
"""Sizes of a group that torch's kernel takes."""


def quantize_groups(w_NK: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 (N, K), scales, zeros fp32 (K / G, N)) of finite weights; `group` divides K."""
    w_NgG = w_NK.float().unflatten(1, (-1, group))
    low_Ng, high_Ng = w_NgG.amin(2).clamp(max=0), w_NgG.amax(2).clamp(min=0)
    scales_Ng = ((high_Ng - low_Ng) / TOP).bfloat16().float()
    scales_Ng = torch.where(scales_Ng == 0, 1.0, scales_Ng)
    zeros_Ng = (low_Ng + MIDDLE * scales_Ng).bfloat16().float()
    codes_NgG = ((w_NgG - zeros_Ng[..., None]) / scales_Ng[..., None]).round() + MIDDLE
    return codes_NgG.clamp(0, TOP).to(torch.uint8).flatten(1), scales_Ng.T, zeros_Ng.T


def pack_panels(codes_NK: torch.Tensor, panel: int) -> torch.Tensor:
    """Codes in panels as above: uint8 (N, K / 2), N a multiple of P and K even; a panel is P rows of memory."""
    low, high = codes_NK.view(-1, 2, panel // 2, codes_NK.shape[1]).transpose(2, 3).unbind(1)
    return (low | high << 4).contiguous().view(len(codes_NK), -1)


def unpack_panels(packed: torch.Tensor, panel: int) -> torch.Tensor:
    """The inverse of `pack_panels`, as uint8 (K, N): for every input feature its output features in order."""
    packed = packed.view(len(packed) // panel, -1, panel // 2)
    halves = torch.stack((packed & TOP, packed >> 4), dim=2)
    return halves.transpose(0, 1).flatten(1)


@cache
def kernel_panel() -> int | None:
    """P of torch's kernel for this CPU; None where it has no kernel that reads panels."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    probe_NK = torch.randint(TOP + 1, (128, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe_NK.int(), 1).flatten()
    return next((panel for panel in (64, 32) if packed.equal(pack_panels(probe_NK, panel).flatten())), None)


class Int4Linear(QuantizedLinear):
    """`codes` uint8 (N, K / 2), N filled up to whole panels; `scales` (K / G, N, 2): scale and zero."""

    # As fast at 64 rows as dequantising blocks and their product; 1.5 times slower at 256.
    few_rows = 64

    def __init__(self, linear: nn.Linear, group: int = 32) -> None:
        self.group, self.panel = group, kernel_panel() or PANEL
        super().__init__(linear)
        codes_NK, scales_gN, zeros_gN = quantize_groups(linear.weight.detach(), group)
        missing = -self.out_features % self.panel
        scales_gN2 = F.pad(torch.stack((scales_gN, zeros_gN), dim=2), (0, 0, 0, missing))
        self.register_buffer("codes", pack_panels(F.pad(codes_NK, (0, 0, 0, missing)), self.panel))
        self.register_buffer("scales", scales_gN2.bfloat16())
        self.register_state_dict_post_hook(_to_rows)
        self.register_load_state_dict_pre_hook(_to_panels)

    def find_obstacle(self) -> str | None:
        if kernel_panel() is None:
            return "torch has no kernel for this CPU (it needs AVX2 or AVX-512)"
        if self.group not in GROUPS:
            return f"the kernel takes groups of {', '.join(map(str, GROUPS))}"
        return None

    def packed(self, x_MK: torch.Tensor) -> torch.Tensor:
        scales_gN2 = self.scales.to(torch.bfloat16)
        y_MN = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK.contiguous(), self.codes, self.group, scales_gN2)
        return y_MN if y_MN.shape[1] == self.out_features else y_MN[:, : self.out_features].contiguous()

    def block(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, None]:
        end = -(-stop // self.panel) * self.panel
        codes_KN = unpack_panels(self.codes[start:end], self.panel).to(dtype)
        scales_g1N, zeros_g1N = (
            part_gN.contiguous()[:, None] for part_gN in self.scales[:, start:end].to(dtype).unbind(2)
        )
        w_gGN = codes_KN.unflatten(0, (-1, self.group)).sub_(MIDDLE).mul_(scales_g1N).add_(zeros_g1N)
        return w_gGN.flatten(0, 1)[:, : stop - start].T, None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}"


def _to_rows(layer: Any, state: dict[str, torch.Tensor], prefix: str, _metadata: Any) -> None:
    codes_NK = unpack_panels(state[prefix + "codes"], layer.panel).T[: layer.out_features]
    state[prefix + "codes"] = (codes_NK[:, ::2] | codes_NK[:, 1::2] << 4).contiguous()
    state[prefix + "scales"] = state[prefix + "scales"][:, : layer.out_features].clone()


def _to_panels(layer: Any, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    missing = -layer.out_features % layer.panel
    if (packed := state.get(prefix + "codes")) is not None:
        codes_NK = torch.stack((packed & TOP, packed >> 4), dim=2).flatten(1)
        state[prefix + "codes"] = pack_panels(F.pad(codes_NK, (0, 0, 0, missing)), layer.panel)
    if (scales_gN2 := state.get(prefix + "scales")) is not None:
        state[prefix + "scales"] = F.pad(scales_gN2, (0, 0, 0, missing))
