"""Frequencies of RoPE for contexts longer than those a model was trained on.

A model trained on L0 tokens meets angles t f_i that it never saw when t >= L0. With the scale s = `factor` and the
wavelength w_i = 2 pi / f_i of plane i:

    linear    f_i / s: every position moves into the range of training (Chen et al. 2023, arXiv:2306.15595)
    dynamic   theta (s L / L0 - (s - 1))^(N / (N - 2)) in place of theta for a sequence of L > L0 tokens: the slowest
              plane is interpolated, the fastest stays (NTK-aware scaling, bloc97 and emozilla; Peng et al. 2023,
              arXiv:2309.00071, section 3.3)
    yarn      (1 - g_i) f_i / s + g_i f_i with the ramp g_i = 1 where plane i makes more than `beta_fast` turns in L0
              tokens, 0 where it makes fewer than `beta_slow`: fast planes stay, slow ones are interpolated. cos and sin
              are multiplied by 0.1 ln s + 1 (arXiv:2309.00071, sections 3.2 and 3.4)
    llama3    as yarn, but g_i = (L0 / w_i - low) / (high - low), linear in the turns, and cos and sin as they are
              (Llama 3.1, arXiv:2407.21783; meta-llama/llama-models, `apply_scaling`)

Relative to the YaRN paper: the ramp is linear in the index i, between the planes that make `beta_fast` and `beta_slow`
turns, not in the turns, as in its authors' code. DeepSeek-V3 divides the factor of cos and sin by that of
`mscale_all_dim` and multiplies the scale of attention by its square instead (`yarn_mscale`). All operations have the
order and precision of transformers' `modeling_rope_utils`, so that the numbers are equal bit for bit.

N numbers of a head that are turned (`dim`), F = N/2 planes; all tables are fp32 on the CPU.
"""

from __future__ import annotations

import math

import torch


def plain_frequencies(dim: int, theta: float | torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """f_F = theta^(-2i/dim) in radians per token; a theta_B11 gives f_B1F."""
    return 1.0 / theta ** _exponents(dim, device)


def linear_frequencies(dim: int, theta: float, factor: float) -> torch.Tensor:
    """f_F of position interpolation."""
    return plain_frequencies(dim, theta) / factor


def dynamic_frequencies(
    dim: int, theta: float, factor: float, original_length: int, length_B11: torch.Tensor
) -> torch.Tensor:
    """f_B1F for rows of length_B11 tokens; those of `original_length` for shorter ones."""
    length_B11 = length_B11.clamp(min=original_length)
    grown_B11 = theta * ((factor * length_B11 / original_length) - (factor - 1)) ** (dim / (dim - 2))
    return plain_frequencies(dim, grown_B11, length_B11.device)


def llama3_frequencies(
    dim: int, theta: float, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> torch.Tensor:
    """f_F of Llama 3.1: planes of more than `high_freq_factor` turns in `original_length` tokens stay, those of fewer
    than `low_freq_factor` are slowed by `factor`."""
    f_F = plain_frequencies(dim, theta)
    wavelength_F = 2 * math.pi / f_F
    kept_F = (original_length / wavelength_F - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended_F = (1 - kept_F) * f_F / factor + kept_F * f_F
    slow_F = wavelength_F > original_length / low_freq_factor
    fast_F = wavelength_F < original_length / high_freq_factor
    return torch.where(slow_F, f_F / factor, torch.where(fast_F, f_F, blended_F))


def yarn_frequencies(
    dim: int,
    theta: float,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> torch.Tensor:
    """f_F of YaRN; `truncate` widens the ramp to whole planes."""

    def plane_of(turns: float) -> float:
        """Index (not a whole number) of the plane that makes so many turns in `original_length` tokens."""
        return (dim * math.log(original_length / (turns * 2 * math.pi))) / (2 * math.log(theta))

    first, last = plane_of(beta_fast), plane_of(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # a step instead of a division by zero

    ramp_F = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
    kept_F = 1 - ramp_F
    period_F = theta ** _exponents(dim, "cpu")
    return 1.0 / (factor * period_F) * (1 - kept_F) + 1.0 / period_F * kept_F


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1: how much sharper attention must be over `factor` times as many tokens."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _exponents(dim: int, device: torch.device | str) -> torch.Tensor:
    return torch.arange(0, dim, 2, device=device).float() / dim
