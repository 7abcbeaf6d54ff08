"""How a model knows the order of tokens: at the embedding (`embed`), in queries and keys (`rotate`) or in the scores
of attention (`mask`).

    learned      x_t + P[t], P a trained table (GPT-2)
    sinusoidal   sqrt(D) x_t + s_t, s_t[2i] = sin(t / 10000^(2i/D)), s_t[2i+1] = cos(t / 10000^(2i/D))
                 (Vaswani et al. 2017, sections 3.4 and 3.5)
    none         the causal mask alone (Kazemnejad et al. 2023, arXiv:2305.19466)
    rope         `sky_core.model.rope`: q and k are turned
    alibi        `sky_core.model.alibi`: scores fall with the distance

B batch (1 where all rows share their positions), H heads, T time, D model width, E width of a head, F waves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sky_core.model.context import Context
from sky_core.model.mask import Mask


class PositionEncoding(nn.Module):
    """Leaves everything as it is; encodings override the place where they act."""

    def embed(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Embeddings with the order in them; called once, after the token embedding."""
        return x_BTD

    def prepare(self, ctx: Context) -> None:
        """Called once per forward pass, before the first layer: put shared tables into `ctx.tables`."""

    def rotate(self, q_BHTE: torch.Tensor, k_BHTE: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys with the order in them; called by every attention layer (H may differ between the two)."""
        return q_BHTE, k_BHTE

    def mask(self, mask: Mask) -> Mask:
        """The mask with the order in it; called by every attention layer."""
        return mask

    def in_layers(self) -> PositionEncoding:
        """What attention layers hold: this encoding when it acts there, else one that does nothing (a table of the
        embedding must not become a parameter of every layer)."""
        return PositionEncoding()


class LayerEncoding(PositionEncoding):
    """Acts in attention layers. Its buffers are fp32 constants: they move with the model, casts do not round them."""

    def in_layers(self) -> PositionEncoding:
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Casts of a model leave integers alone, so the constants pass as their bits.
        return super()._apply(lambda tensor: fn(tensor.view(torch.int32)).view(torch.float32), recurse)


class LearnedPosition(PositionEncoding):
    """One trained vector per position."""

    def __init__(self, d_model: int, max_length: int) -> None:
        super().__init__()
        self.embed_positions = nn.Embedding(max_length, d_model)

    def embed(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        return x_BTD + self.embed_positions(ctx.positions_BT)


class SinusoidalPosition(PositionEncoding):
    """The fixed waves of the Transformer; embeddings are scaled by sqrt(D) so that they are heard above them."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def embed(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        exponents_F = torch.arange(0, self.d_model, 2, device=x_BTD.device).float() / self.d_model
        angle_BTF = ctx.positions_BT[:, :, None].float() / 10000.0**exponents_F
        wave_BTD = torch.stack((angle_BTF.sin(), angle_BTF.cos()), dim=-1).flatten(-2)
        return x_BTD * math.sqrt(self.d_model) + wave_BTD.to(x_BTD.dtype)
