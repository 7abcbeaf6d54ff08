"""Attention with linear biases: a score falls with the distance of its key, each head at a slope of its own.

Press et al. 2021 (arXiv:2108.12409), section 3: softmax(q_t · k_s / sqrt(E) - m_h |t - s|) with the slopes
m_h = 2^(-8h/n), h = 1..n, for a power of two n of heads. Other numbers of heads (the authors' `get_slopes`): the slopes
of the power of two n below, then every other one of those of 2n. Nothing is added to embeddings, queries or keys, and
sequences longer than those of training work.

Relative to the paper: |t - s| in place of t - s, so that it also holds where later tokens are seen (a bidirectional
mask, the prefix of a prefix LM); key/value prefixes have no distance. The bias itself is `Mask.bias`.

H query heads.
"""

from __future__ import annotations

import torch

from sky_core.model.mask import Mask
from sky_core.model.position import LayerEncoding


class AlibiPosition(LayerEncoding):
    """Gives the mask its slopes."""

    slopes_H: torch.Tensor

    def __init__(self, n_head: int) -> None:
        super().__init__()
        slopes_H = torch.tensor(alibi_slopes(n_head), dtype=torch.float32, device="cpu")
        self.register_buffer("slopes_H", slopes_H, persistent=False)

    def mask(self, mask: Mask) -> Mask:
        return mask.with_slopes(self.slopes_H)


def alibi_slopes(n_head: int) -> list[float]:
    """The slope of each head."""
    below = 1 << (n_head.bit_length() - 1)
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    between = [2 ** (-8 * h / (2 * below)) for h in range(1, 2 * below + 1, 2)]
    return slopes + between[: n_head - below]
