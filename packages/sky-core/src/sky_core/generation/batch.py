"""Rows that grow together under a draft: one pass of the model over its guesses per round; finished rows drop out.

B rows, T time (tokens), K places (proposed tokens and the one after them), D model width, V vocabulary, N = B K.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from sky_core.generation.passes import extend, last, padded
from sky_core.generation.row import SLIDING, Row
from sky_core.generation.speculative import Draft, Proposal, Task, accept, distribution

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel

log = logging.getLogger("sky_core.generation")


class DraftedBatch:
    """The rows that are not finished, their cache, and the last pass, whose end says what may come next.

    That pass took in `read[b]` tokens of row b, the last of them those of `proposal`; `begun[b]` where they were the
    first of a context.
    """

    def __init__(self, model: LanguageModel, vocab_size: int, rows: list[Row], draft: Draft) -> None:
        self.model, self.vocab_size, self.rows, self.ahead = model, vocab_size, rows, draft.tokens
        slots = max(len(row.tokens) + row.left for row in rows) + self.ahead
        prompts = list(dict.fromkeys(tuple(row.tokens) for row in rows))
        self.cache = model.new_cache(len(prompts), min(model.max_length, slots))
        self.cache.rollback(self.cache.lengths)  # says now whether every layer can
        self.probabilities = distribution(rows[0].choose)
        self.drafter = draft.start(Task(model, self.probabilities, vocab_size, len(rows), slots))
        self.hidden_BTD, self.cache = extend(model, prompts, self.cache)
        if len(prompts) < len(rows):
            where = {prompt: i for i, prompt in enumerate(prompts)}
            copies = [where[tuple(row.tokens)] for row in rows]
            self.hidden_BTD, self.cache = self.hidden_BTD[copies], self.cache.select(copies)
        self.read, self.begun = [len(row.tokens) for row in rows], [True] * len(rows)
        self.proposal = Proposal([[] for _ in rows])
        self.rejected = [0] * len(rows)
        self._slid = False

    def choose(self) -> list[tuple[Row, int, list[int], list[float]]]:
        """Per row: how many tokens had been proposed, its next tokens (the accepted and one more), their logprobs."""
        drafted = [len(tokens) for tokens in self.proposal.tokens]
        logits_BKV = self.model.logits(last(self.hidden_BTD, self.read, [1 + count for count in drafted])).float()
        chosen = self._next(logits_BKV[..., : self.vocab_size])  # beyond it, a padded vocabulary's ids mean nothing
        self.rejected = [1 + count - len(tokens) for count, tokens in zip(drafted, chosen, strict=True)]
        chosen_BK, _ = padded(chosen, logits_BKV.device)
        logits_BKV = logits_BKV[:, : chosen_BK.shape[1]]
        logprob_BK = logits_BKV.gather(-1, chosen_BK[..., None])[..., 0] - logits_BKV.logsumexp(-1)
        logprobs = [row[: len(tokens)] for row, tokens in zip(logprob_BK.tolist(), chosen, strict=True)]
        return list(zip(self.rows, drafted, chosen, logprobs, strict=True))

    def _next(self, logits_BKV: torch.Tensor) -> list[list[int]]:
        places = logits_BKV.shape[1]
        pairs = zip(self.rows, self.proposal.tokens, strict=True)
        before_N = [row.tokens + tokens[:place] for row, tokens in pairs for place in range(places)]
        p_NV = self.probabilities(logits_BKV.flatten(0, 1), before_N)
        return accept(p_NV.unflatten(0, (-1, places)), self.proposal, [row.generator for row in self.rows])

    def advance(self) -> None:
        """Leave the rows that are finished, and take what was chosen for the others into the cache."""
        self.cache.rollback([n - count for n, count in zip(self.cache.lengths, self.rejected, strict=True)])
        certain = [n - count for n, count in zip(self.read, self.rejected, strict=True)]
        self.drafter.observe(self.hidden_BTD, certain, self.begun)
        going = [i for i, row in enumerate(self.rows) if row.finish is None]
        if len(going) < len(self.rows):
            self.rows = [self.rows[i] for i in going]
            if not going:
                return
            self.cache = self.cache.select(going)
            self.drafter.select(going)

        kept = max(1, self.cache.max_length // 2)
        self.begun = [length == self.cache.max_length for length in self.cache.lengths]
        if any(self.begun):
            self.cache.reset([i for i, begins in enumerate(self.begun) if begins])
            if not self._slid:
                log.info(SLIDING, self.cache.max_length, kept)
            self._slid = True
        blocks = [row.tokens[-kept if begins else -1 :] for row, begins in zip(self.rows, self.begun, strict=True)]
        self.proposal = self._propose(blocks)
        blocks = [block + tokens for block, tokens in zip(blocks, self.proposal.tokens, strict=True)]
        self.hidden_BTD, self.cache = extend(self.model, blocks, self.cache)
        self.read = [len(block) for block in blocks]

    def _propose(self, blocks: list[list[int]]) -> Proposal:
        """What the draft adds to `blocks`: no more than fits the cache, and nothing that `max_new_tokens` cuts off."""
        ends = [length + len(block) for length, block in zip(self.cache.lengths, blocks, strict=True)]
        room = [min(self.ahead, self.cache.max_length - end) for end in ends]
        counts = [min(free, row.left - 1) for free, row in zip(room, self.rows, strict=True)]
        tokens, generators = [row.tokens for row in self.rows], [row.generator for row in self.rows]
        return self.drafter.propose(tokens, counts, generators)
