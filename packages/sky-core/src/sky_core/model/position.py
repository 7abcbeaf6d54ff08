"""How a model knows the order of tokens: at the embedding (`embed`) or inside every attention layer (`rotate`).

    learned      x_t + P[t], P a trained table (GPT-2)
    sinusoidal   sqrt(D) x_t + s_t, s_t[2i] = sin(t / 10000^(2i/D)), s_t[2i+1] = cos(t / 10000^(2i/D))
                 (Vaswani et al. 2017, sections 3.4 and 3.5)
    rope         q_t and k_t turned by the angle t theta^(-2i/E) in plane i, so that q_t · k_s depends on t - s only
                 (Su et al. 2021, arXiv:2104.09864, equation 34)
    none         the causal mask alone (Kazemnejad et al. 2023, arXiv:2305.19466)

Relative to the RoPE paper: plane i is the pair (i, i + E/2), not (2i, 2i + 1): the half-split convention of
Hugging Face checkpoints. The two differ by a permutation of the rows of q_proj and k_proj.

B batch (1 where all rows share their positions), H heads, T time, D model width, E width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from sky_core.model.context import Context


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

    def in_layers(self) -> PositionEncoding:
        """What attention layers hold: this encoding when it acts there, else one that does nothing (a table of the
        embedding must not become a parameter of every layer)."""
        return PositionEncoding()


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
        angle_BTF = _angles(ctx.positions_BT, self.d_model, 10000.0)
        wave_BTD = torch.stack((angle_BTF.sin(), angle_BTF.cos()), dim=-1).flatten(-2)
        return x_BTD * math.sqrt(self.d_model) + wave_BTD.to(x_BTD.dtype)


class RotaryPosition(PositionEncoding):
    """Rotary position embedding; the tables are fp32 and made once per forward pass."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.name = f"rope-{head_dim}-{theta}"

    def in_layers(self) -> PositionEncoding:
        return self

    def prepare(self, ctx: Context) -> None:
        if self.name not in ctx.tables:
            angle_B1TF = _angles(ctx.positions_BT, self.head_dim, self.theta)[:, None]
            ctx.tables[self.name] = (angle_B1TF.cos(), angle_B1TF.sin())

    def rotate(self, q_BHTE: torch.Tensor, k_BHTE: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        self.prepare(ctx)
        cos_B1TF, sin_B1TF = ctx.tables[self.name]
        return _turn(q_BHTE, cos_B1TF, sin_B1TF), _turn(k_BHTE, cos_B1TF, sin_B1TF)


def _angles(positions_BT: torch.Tensor, dim: int, theta: float) -> torch.Tensor:
    """angle[b, t, i] = positions_BT[b, t] * theta^(-2i/dim) in fp32, i < dim / 2."""
    exponents_F = torch.arange(0, dim, 2, device=positions_BT.device).float() / dim
    return positions_BT[:, :, None].float() * (1.0 / theta**exponents_F)


def _turn(x_BHTE: torch.Tensor, cos_B1TF: torch.Tensor, sin_B1TF: torch.Tensor) -> torch.Tensor:
    first, second = x_BHTE.chunk(2, dim=-1)
    turned = (first * cos_B1TF - second * sin_B1TF, second * cos_B1TF + first * sin_B1TF)
    return torch.cat(turned, dim=-1).to(x_BHTE.dtype)
