"""Speculative decoding: a draft proposes tokens, the model checks them all in one pass, its distribution stays.

Leviathan et al. 2023 (arXiv:2211.17192), algorithm 1; Chen et al. 2023 (arXiv:2302.01318), algorithm 2. The draft draws
x_1 .. x_k, x_i from q_i; one pass of the model over all of them gives p_1 .. p_(k+1), what its sampler would draw from
in each place. Then

    x_i is accepted with probability min(1, p_i(x_i) / q_i(x_i)), one after the other;
    the first that is not is replaced by a draw from norm(max(p_i - q_i, 0)), and what follows it is dropped;
    when all are accepted, a further token is drawn from p_(k+1).

The tokens are then distributed as if the model had drawn each (Leviathan et al., appendix A.1), whatever the draft is:
its quality decides how many tokens a pass brings, from 1 to k + 1.

Relative to the papers: p is the distribution after temperature, penalty and truncation, place by place, and greedy
decoding is the case in which p is all on one token. A draft that looks its tokens up has all of q_i on x_i.

B rows, K places (proposed tokens and one more), V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from sky_core.errors import UserError
from sky_core.generation.sampling import invert

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel


@dataclass(frozen=True)
class Proposal:
    """What may follow each row: `tokens[b]`, drawn one after the other from `q_BKV[b]` (float64; places beyond the
    row's tokens hold anything). `q_BKV` is None when each token was certain."""

    tokens: list[list[int]]
    q_BKV: torch.Tensor | None = None


class Drafter(ABC):
    """The draft of one batch of rows while they grow."""

    @abstractmethod
    def propose(
        self, rows: Sequence[Sequence[int]], counts: Sequence[int], generators: Sequence[torch.Generator]
    ) -> Proposal:
        """At most counts[b] tokens (it may be 0) after all of `rows[b]`.

        What a row is offered, and what is drawn from its generator, depends on the row alone.
        """

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Row i is from now on what row rows[i] was."""

    def observe(self, hidden_BTD: torch.Tensor, counts: Sequence[int], begun: Sequence[bool]) -> None:  # noqa: B027 - most read tokens alone
        """What the model made of the tokens that it took in: the first counts[b] positions of row b are certain.

        They follow those of the calls before, or, where `begun[b]`, are the first of the model's context.
        """


@dataclass(frozen=True)
class Task:
    """What a draft is told before the first token: the model that it drafts for, `(logits_BV, rows) -> p_BV` of the
    sampler in use, how many ids have a meaning, and how many tokens the longest of `batch` rows may come to hold."""

    model: LanguageModel
    probabilities: Callable[..., torch.Tensor]
    vocab_size: int
    batch: int
    slots: int


class Draft(ABC):
    """A way to guess ahead, `tokens` at a time; `start` begins with it, as often as one likes."""

    tokens: int

    @abstractmethod
    def start(self, task: Task) -> Drafter:
        """Raises `UserError` when the draft cannot serve that model."""


def distribution(choose: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`probabilities` of a built sampler. Raises `UserError` where it has none."""
    stated: Any = getattr(choose, "probabilities", None)
    if stated is None:
        raise UserError(
            f"the sampler {getattr(choose, '__name__', type(choose).__name__)} does not state the probabilities it"
            " draws from, and a draft is checked against these; use another sampler, or no draft"
        )
    return stated


def accept(p_BKV: torch.Tensor, proposal: Proposal, generators: Sequence[torch.Generator]) -> list[list[int]]:
    """The new tokens of each row: those accepted, then one of the model's own.

    `p_BKV` (float64) is what the model draws from in the place of each proposed token and in the one after. Row b takes
    one number more from its generator than it has proposed tokens.
    """
    counts = [len(tokens) for tokens in proposal.tokens]
    device, rows_B = p_BKV.device, torch.arange(len(counts), device=p_BKV.device)
    u_BK = pad_sequence(
        [
            torch.rand(count + 1, generator=generator, device=generator.device, dtype=torch.float64)
            for count, generator in zip(counts, generators, strict=True)
        ],
        batch_first=True,
    ).to(device)
    counts_B = torch.tensor(counts, device=device)
    accepted_B = torch.zeros_like(counts_B)
    left_BV = p_BKV[:, 0]
    if max(counts):
        draft_BK = torch.tensor([[*tokens, *[0] * (max(counts) - len(tokens))] for tokens in proposal.tokens]).to(
            device
        )
        q_BKV = (
            torch.zeros_like(p_BKV[:, :-1]).scatter_(-1, draft_BK[..., None], 1.0)
            if proposal.q_BKV is None
            else proposal.q_BKV.to(device)
        )
        p_BK, q_BK = (x_BKV.gather(-1, draft_BK[..., None])[..., 0] for x_BKV in (p_BKV[:, :-1], q_BKV))
        proposed_BK = torch.arange(max(counts), device=device) < counts_B[:, None]
        accepted_B = ((u_BK[:, :-1] * q_BK < p_BK) & proposed_BK).cumprod(1).sum(1)
        p_BV = p_BKV[rows_B, accepted_B]
        q_BV = q_BKV[rows_B, accepted_B.clamp(max=max(counts) - 1)] * (accepted_B < counts_B)[:, None]
        rest_BV = (p_BV - q_BV).clamp(min=0)
        # Where rounding leaves p no more than q anywhere, the two are one, and nothing but rounding rejected.
        left_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
    next_B = invert(left_BV, u_BK.gather(-1, counts_B[:, None]))
    return [
        [*tokens[:count], token]
        for tokens, count, token in zip(proposal.tokens, accepted_B.tolist(), next_B.tolist(), strict=True)
    ]
