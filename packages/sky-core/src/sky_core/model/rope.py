"""Rotary position embedding: q and k are turned by angles that grow with their position.

Su et al. 2021 (arXiv:2104.09864), equation 34: in plane i, q_t and k_t are turned by the angle t f_i with
f_i = theta^(-2i/N), so that q_t · k_s depends on t - s only. `sky_core.model.rope_scaling` changes f for contexts
longer than those of training. Relative to the paper:

    planes        plane i is the pair (i, i + N/2), the convention of Hugging Face checkpoints; with `interleaved` it is
                  (2i, 2i + 1) as in the paper, GPT-J and DeepSeek-V3. The two differ by a permutation of the rows of
                  q_proj and k_proj.
    partial       only the first N numbers of a head are turned, the others know no position (GPT-NeoX,
                  arXiv:2204.06745: N = E/4).
    truncated     f_i = theta^(-i / (N/4 - 1)) for i < N/4, from 1 to 1/theta, and 0 for the other N/4 planes, which
                  do not turn: the "half-truncate RoPE" of modded-nanoGPT (You Jiacheng; class Rotary of
                  github.com/KellerJordan/modded-nanogpt with theta = 1024), which turns the other way round:
                  the same but for the sign of half of the rows of q_proj and k_proj.

B batch (1 where all rows share their positions), H heads, T time, E width of a head, N numbers of it that are turned,
F = N/2 planes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sky_core.model.context import Context
from sky_core.model.position import LayerEncoding
from sky_core.model.rope_scaling import dynamic_frequencies, plain_frequencies

if TYPE_CHECKING:
    from sky_core.components.position import DynamicScaling, Scaling


class RotaryPosition(LayerEncoding):
    """Turns the first `dim` numbers of each head. The tables are fp32 and made once per forward pass."""

    frequencies_F: torch.Tensor

    def __init__(
        self,
        dim: int,
        theta: float,
        *,
        scaling: Scaling | None = None,
        truncated: bool = False,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.theta, self.interleaved = dim, theta, interleaved
        if truncated:
            frequencies_F, self.attention_factor = truncated_frequencies(dim, theta), 1.0
        elif scaling is None:
            frequencies_F, self.attention_factor = plain_frequencies(dim, theta), 1.0
        else:
            frequencies_F, self.attention_factor = scaling.frequencies(dim, theta)
        self.register_buffer("frequencies_F", frequencies_F, persistent=False)
        self.name = f"rope dim={dim} theta={theta} truncated={truncated} scaling={scaling!r}"

    def frequencies(self, ctx: Context) -> torch.Tensor:
        """Radians per token of each plane in this pass: (F,) or (B, 1, F)."""
        return self.frequencies_F

    def prepare(self, ctx: Context) -> None:
        if self.name not in ctx.tables:
            angle_B1TF = (ctx.positions_BT[:, :, None].float() * self.frequencies(ctx))[:, None]
            ctx.tables[self.name] = tuple(
                table * self.attention_factor for table in (angle_B1TF.cos(), angle_B1TF.sin())
            )

    def rotate(self, q_BHTE: torch.Tensor, k_BHTE: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        self.prepare(ctx)
        cos_B1TF, sin_B1TF = ctx.tables[self.name]
        return self._turn(q_BHTE, cos_B1TF, sin_B1TF), self._turn(k_BHTE, cos_B1TF, sin_B1TF)

    def _turn(self, x_BHTE: torch.Tensor, cos_B1TF: torch.Tensor, sin_B1TF: torch.Tensor) -> torch.Tensor:
        x_BHTN, rest = x_BHTE[..., : self.dim], x_BHTE[..., self.dim :]
        if self.interleaved:
            first, second = x_BHTN[..., 0::2], x_BHTN[..., 1::2]
        else:
            first, second = x_BHTN.chunk(2, dim=-1)
        turned = (first * cos_B1TF - second * sin_B1TF, second * cos_B1TF + first * sin_B1TF)
        y_BHTN = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved else torch.cat(turned, dim=-1)
        y_BHTN = y_BHTN.to(x_BHTE.dtype)
        return torch.cat((y_BHTN, rest), dim=-1) if rest.shape[-1] else y_BHTN


class DynamicRotaryPosition(RotaryPosition):
    """Dynamic NTK: the base grows with the length of each row, once that exceeds `scaling.original_length`.

    The length is that of the pass: one more than the largest position of a row (padding aside). So rows of a batch do
    not change each other, and nothing is remembered from pass to pass. With a cache each key keeps the turn of the pass
    it came in, as in transformers: up to `original_length` tokens decoding step by step equals the parallel forward,
    past them it does not, because the parallel forward turns all keys by the last base.
    """

    def __init__(self, dim: int, theta: float, *, scaling: DynamicScaling, interleaved: bool = False) -> None:
        super().__init__(dim, theta, scaling=scaling, interleaved=interleaved)
        self.factor, self.original_length = scaling.factor, scaling.original_length

    def frequencies(self, ctx: Context) -> torch.Tensor:
        positions_BT = ctx.positions_BT if ctx.valid_BT is None else ctx.positions_BT.masked_fill(~ctx.valid_BT, 0)
        length_B11 = positions_BT.amax(dim=1)[:, None, None] + 1
        grown_B1F = dynamic_frequencies(self.dim, self.theta, self.factor, self.original_length, length_B11)
        return torch.where(length_B11 > self.original_length, grown_B1F, self.frequencies_F)


def truncated_frequencies(dim: int, theta: float) -> torch.Tensor:
    """f_F of half-truncated RoPE: a quarter of `dim` frequencies from 1 to 1/theta, then as many zeros."""
    turning = (1 / theta) ** torch.linspace(0, 1, dim // 4, dtype=torch.float32, device="cpu")
    return torch.cat((turning, torch.zeros_like(turning)))
