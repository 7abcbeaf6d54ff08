"""Choosing the next token: pure functions from logits to logits, and the draw itself.

    repetition_penalty   Keskar et al. 2019 (CTRL, arXiv:1909.05858), section 4.1
    temperature          p_i ∝ exp(x_i / T)
    top_k                Fan et al. 2018 (arXiv:1805.04833), section 5.4
    top_p                Holtzman et al. 2020 (nucleus sampling, arXiv:1904.09751), section 3.1, equations 2 and 3
    min_p                Nguyen et al. 2024 (arXiv:2407.01082), section 3, algorithm 1

`TokenSampler` applies them in this order. It matters: the penalty acts on the model's own logits, and the three
truncations see the distribution after temperature (so does Hugging Face; Nguyen et al. prefer min-p before it).
Each truncation sets the logits it removes to -inf and keeps the most probable token.

Where we differ: CTRL divides the logits of earlier tokens by θ > 1, which would *raise* a negative logit; negative
logits are multiplied by θ here, as in Hugging Face. The prompt counts as earlier tokens.

B rows, V vocabulary, K of its most probable tokens, N blocks of the vocabulary, W tokens of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn.functional import one_hot

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]
"""One generator for the whole batch, or one per row (then a row's draw does not depend on its neighbours)."""

BLOCK = 128
"""Tokens whose weights `invert` sums first."""

FEW = 256
"""Most probable tokens among which `top_p` looks for the nucleus before it sorts the vocabulary."""


def repetition_penalty(logits_BV: torch.Tensor, tokens: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """Make the tokens that row b holds already (`tokens[b]`) less probable; a penalty below 1 favours them."""
    logits_BV = logits_BV.clone()
    for logits_V, ids in zip(logits_BV, tokens, strict=True):
        seen_N = torch.tensor(list(set(ids)), dtype=torch.long, device=logits_BV.device)
        logits_N = logits_V[seen_N]
        logits_V[seen_N] = torch.where(logits_N > 0, logits_N / penalty, logits_N * penalty)
    return logits_BV


def temperature(logits_BV: torch.Tensor, value: float) -> torch.Tensor:
    """Logits over `value` > 0, the largest shifted to 0 first so that a tiny temperature does not overflow."""
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / value


def top_k(logits_BV: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest logits, and whatever ties with the k-th."""
    kth_B1 = logits_BV.topk(min(k, logits_BV.shape[-1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)


def top_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the nucleus: the smallest set of most probable tokens whose probability is at least p; p = 1 keeps all.

    Among equals it takes the smallest ids.
    """
    if p >= 1:  # rounding in the sum must not cut the tail
        return logits_BV
    kept_BV, cut_B, least_B = _nucleus(logits_BV, p, FEW)
    if logits_BV.shape[-1] > FEW:
        # What equals the least of the few may also stand beyond them, and so may the rest of a wide nucleus.
        wide = (cut_B <= least_B).nonzero().squeeze(-1)
        kept_BV[wide] = _nucleus(logits_BV[wide], p, logits_BV.shape[-1])[0]
    return logits_BV.masked_fill(~kept_BV, -torch.inf)


def _nucleus(logits_BV: torch.Tensor, p: float, few: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nucleus among the `few` largest logits as kept_BV, the least logit in it, and the least of the few."""
    if few < logits_BV.shape[-1]:
        id_BK = logits_BV.topk(few).indices.sort().values
        top_BK, order_BK = logits_BV.gather(-1, id_BK).sort(descending=True, stable=True)
        id_BK = id_BK.gather(-1, order_BK)
        other_BV = (logits_BV - top_BK[:, :1]).exp().scatter(-1, id_BK, 0.0)
    else:
        top_BK, id_BK = logits_BV.sort(descending=True, stable=True)
        other_BV = torch.zeros_like(top_BK[:, :1])
    weight_BK = (top_BK - top_BK[:, :1]).double().exp()
    enough_B1 = p * (weight_BK.sum(-1, keepdim=True) + other_BV.sum(-1, keepdim=True, dtype=torch.float64))
    inside_BK = weight_BK.cumsum(-1) - weight_BK < enough_B1
    cut_B = top_BK.gather(-1, inside_BK.sum(-1, keepdim=True).clamp(min=1) - 1).squeeze(-1)
    kept_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(-1, id_BK, inside_BK)
    return kept_BV, cut_B, top_BK[:, -1]


def min_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Keep tokens at least p times as probable as the most probable one."""
    probability_BV = logits_BV.softmax(-1)
    return logits_BV.masked_fill(probability_BV < p * probability_BV.amax(-1, keepdim=True), -torch.inf)


def greedy(logits_BV: torch.Tensor) -> torch.Tensor:
    """next_B: the most probable token, the smallest id among equals."""
    return logits_BV.argmax(-1)


def draw(logits_BV: torch.Tensor, generator: Generators) -> torch.Tensor:
    """next_B drawn from softmax(logits); tokens rarer than 2^-24 keep their chance."""
    dtype = torch.promote_types(logits_BV.dtype, torch.float32)
    return draw_from(logits_BV.softmax(-1, dtype=dtype), generator)


def draw_from(p_BV: torch.Tensor, generator: Generators) -> torch.Tensor:
    """next_B drawn from p, with one uniform number per row."""
    return invert(p_BV, _uniform(len(p_BV), generator))


def invert(weight_BV: torch.Tensor, u_B1: torch.Tensor) -> torch.Tensor:
    """next_B: where the distribution function of `weight_BV` (not necessarily of sum 1) reaches u in [0, 1).

    A token of weight 0 is never chosen. The function is summed in float64, first over blocks of the vocabulary, then
    over the tokens of the block that u falls into: a tenth of the time of a sum over all tokens.
    """
    whole = weight_BV.shape[-1] // BLOCK * BLOCK
    sum_BN = weight_BV[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1).double()
    if whole < weight_BV.shape[-1]:
        sum_BN = torch.cat((sum_BN, weight_BV[:, whole:].sum(-1, keepdim=True).double()), dim=-1)
    block_B1, share_B1 = _reached(sum_BN, u_B1.to(weight_BV.device))
    id_BW = block_B1 * BLOCK + torch.arange(BLOCK, device=weight_BV.device)
    inside_BW = weight_BV.gather(-1, id_BW.clamp(max=weight_BV.shape[-1] - 1)).double()
    inside_BW = inside_BW.masked_fill(id_BW >= weight_BV.shape[-1], 0.0)
    place_B1, _ = _reached(inside_BW, share_B1)
    return (block_B1 * BLOCK + place_B1).squeeze(-1).clamp(max=weight_BV.shape[-1] - 1)  # NaN: the caller finds it


def _reached(weight_BN: torch.Tensor, u_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The place where the distribution function of `weight_BN` reaches u, and how far into it, in [0, 1]."""
    cdf_BN = weight_BN.cumsum(-1)
    target_B1 = u_B1 * cdf_BN[:, -1:]
    last_B1 = (cdf_BN < cdf_BN[:, -1:]).sum(-1, keepdim=True)  # rounding must not lead past the last weight
    place_B1 = torch.searchsorted(cdf_BN, target_B1, right=True).minimum(last_B1)
    weight_B1 = weight_BN.gather(-1, place_B1)
    return place_B1, ((target_B1 - cdf_BN.gather(-1, place_B1) + weight_B1) / weight_B1).clamp(0, 1)


def _uniform(rows: int, generator: Generators) -> torch.Tensor:
    """u_B1 in [0, 1)."""
    if isinstance(generator, torch.Generator):
        return torch.rand(rows, 1, generator=generator, device=generator.device, dtype=torch.float64)
    return torch.cat([torch.rand(1, 1, generator=g, device=g.device, dtype=torch.float64) for g in generator])


def row_generator(seed: int, row: int) -> torch.Generator:
    """The random stream of one request: (seed, row) decide it, and nothing else."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class TokenSampler:
    """`(logits_BV, tokens, generator) -> next_B`: the processors that are set, in the order above, then a draw.

    Temperature 0 takes the most probable token (after the penalty) and needs no generator.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __call__(
        self, logits_BV: torch.Tensor, tokens: Sequence[Sequence[int]], generator: Generators | None
    ) -> torch.Tensor:
        if self.repetition_penalty != 1:
            logits_BV = repetition_penalty(logits_BV, tokens, self.repetition_penalty)
        if self.temperature == 0:
            return greedy(logits_BV)
        assert generator is not None, "sampling needs a generator"
        return draw(self.truncated(logits_BV), generator)

    def probabilities(self, logits_BV: torch.Tensor, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """p_BV (float64): what `__call__` draws from; at temperature 0 all of it is on one token."""
        if self.repetition_penalty != 1:
            logits_BV = repetition_penalty(logits_BV, tokens, self.repetition_penalty)
        if self.temperature == 0:
            return one_hot(greedy(logits_BV), logits_BV.shape[-1]).double()
        return self.truncated(logits_BV).softmax(-1, dtype=torch.float64)

    def truncated(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Logits after temperature, top-k, top-p and min-p: their softmax is what is drawn from."""
        logits_BV = temperature(logits_BV, self.temperature)
        if self.top_k is not None:
            logits_BV = top_k(logits_BV, self.top_k)
        if self.top_p is not None:
            logits_BV = top_p(logits_BV, self.top_p)
        if self.min_p is not None:
            logits_BV = min_p(logits_BV, self.min_p)
        return logits_BV
