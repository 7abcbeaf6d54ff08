"""Who proposes: a smaller model, the text itself, or the model's own modules of multi-token prediction.

    DraftModel      Leviathan et al. 2023 (arXiv:2211.17192), section 2.1: any model of the same vocabulary
    PromptLookup    Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding): what followed the row's last n-gram
                    when it occurred before. Where we differ: the last occurrence instead of the first, and what is
                    copied may run into itself, so that a repeating pattern goes on for as long as is asked.
    MtpDraft        DeepSeek-V3 (arXiv:2412.19437), sections 2.2 and 5.4.3: module k proposes the k-th token

`sky_core.generation.speculative` says how proposals are checked; none of these can change what the model says.

B rows, T time (tokens), K proposed tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from sky_core.errors import UserError
from sky_core.eval.mode import evaluating
from sky_core.generation.passes import extend, in_groups, last, padded
from sky_core.generation.sampling import draw_from
from sky_core.generation.speculative import Draft, Drafter, Proposal, Task
from sky_core.model.language_model import LanguageModel
from sky_core.training.load import load

if TYPE_CHECKING:
    from sky_core.model.cache import Cache
    from sky_core.tokenizer.base import Tokenizer

Rows = Sequence[Sequence[int]]


def make_draft(source: str | Path | LanguageModel | Draft, tokenizer: Tokenizer, tokens: int = 4) -> Draft:
    """The draft that `source` names: "lookup", "mtp", a model, or what `sky_core.load` takes.

    Raises `UserError` when the run that it names was trained with another tokenizer than `tokenizer`.
    """
    if tokens < 1:
        raise UserError(f"draft_tokens is {tokens}; give 1 or more, or no draft")
    if isinstance(source, Draft):
        return source
    if isinstance(source, LanguageModel):
        return DraftModel(source, tokens)
    if source == "lookup":
        return PromptLookup(tokens)
    if source == "mtp":
        return MtpDraft(tokens)
    model, theirs = load(source)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the draft {source} reads with the tokenizer {theirs.fingerprint}, the model with {tokenizer.fingerprint};"
            " give a draft trained with the model's tokenizer"
        )
    return DraftModel(model, tokens)


class _Guesses:
    """Tokens drawn place by place: row b draws its first `counts[b]` and only these from its generator."""

    def __init__(self, task: Task, rows: Rows, counts: Sequence[int], generators: Sequence[torch.Generator]) -> None:
        self.task, self.rows, self.counts, self.generators = task, rows, counts, generators
        self.tokens: list[list[int]] = [[] for _ in rows]
        self.q: list[torch.Tensor] = []

    def draw(self, logits_BV: torch.Tensor) -> None:
        """One more token of each row that wants one."""
        place = len(self.q)
        drawing = [b for b, count in enumerate(self.counts) if count > place]
        if not drawing:
            return
        before = [[*row, *tokens] for row, tokens in zip(self.rows, self.tokens, strict=True)]
        q_BV = self.task.probabilities(logits_BV[:, : self.task.vocab_size].float(), before)
        next_B = draw_from(q_BV[drawing], [self.generators[b] for b in drawing])
        for b, token in zip(drawing, next_B.tolist(), strict=True):
            self.tokens[b].append(token)
        self.q.append(q_BV)

    def at(self, place: int) -> list[int]:
        """The token of each row in that place, 0 where it has none."""
        return [tokens[place] if place < len(tokens) else 0 for tokens in self.tokens]

    def proposal(self) -> Proposal:
        return Proposal(self.tokens, torch.stack(self.q, dim=1) if self.q else None)


class DraftModel(Draft):
    """A smaller model of the same vocabulary, sampled as the model itself is. It may stand on another device."""

    def __init__(self, model: LanguageModel, tokens: int = 4) -> None:
        self.model, self.tokens = model, tokens

    def start(self, task: Task) -> Drafter:
        if self.model.vocab_size != task.model.vocab_size:
            raise UserError(
                f"the draft's vocabulary has {self.model.vocab_size} ids, the model's {task.model.vocab_size};"
                " give a draft trained with the model's tokenizer"
            )
        if self.model.max_length < 2 * self.tokens:
            raise UserError(
                f"the draft's context of {self.model.max_length} is too short for {self.tokens} tokens at a time;"
                f" propose {self.model.max_length // 2} or fewer"
            )
        return _ModelDrafter(self, task)


class _ModelDrafter(Drafter):
    """Row b's cache holds its tokens from `starts[b]` on: the first `certain[b]` of the row, then `fed[b]` guesses."""

    def __init__(self, draft: DraftModel, task: Task) -> None:
        self.model, self.ahead, self.task = draft.model, draft.tokens, task
        self.starts, self.certain = [0] * task.batch, [0] * task.batch
        self.fed: list[list[int]] = [[] for _ in range(task.batch)]
        self.cache = self.model.new_cache(task.batch, min(self.model.max_length, task.slots))
        self.cache.rollback(self.cache.lengths)  # says now whether its layers can

    def propose(self, rows: Rows, counts: Sequence[int], generators: Sequence[torch.Generator]) -> Proposal:
        guesses = _Guesses(self.task, rows, counts, generators)
        with evaluating(self.model):
            # Even when no row wants a token: where a row starts again must not depend on what others want.
            blocks = self._behind(rows)
            hidden_BTD, self.cache = extend(self.model, blocks, self.cache)
            guesses.draw(self.model.logits(last(hidden_BTD, [len(block) for block in blocks], 1))[:, 0])
            self.certain, self.fed = [len(row) for row in rows], [[] for _ in rows]
            for place in range(max(counts) - 1):
                tokens = guesses.at(place)
                hidden_BTD, self.cache = extend(self.model, [[token] for token in tokens], self.cache)
                guesses.draw(self.model.logits(hidden_BTD)[:, 0])
                for fed, token in zip(self.fed, tokens, strict=True):
                    fed.append(token)
        return guesses.proposal()

    def _behind(self, rows: Rows) -> list[Sequence[int]]:
        """Go back to what came true; what is missing of each row.

        A row whose guesses would not fit starts again from the last half of the draft's context.
        """
        held = []
        for row, fed, certain in zip(rows, self.fed, self.certain, strict=True):
            came = zip(fed, row[certain:-1], strict=False)
            held.append(certain + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], came)))
        self.cache.rollback([end - start for end, start in zip(held, self.starts, strict=True)])
        room = self.cache.max_length - self.ahead + 1
        full = [b for b, row in enumerate(rows) if len(row) - self.starts[b] > room]
        self.cache.reset(full)
        for b in full:
            self.starts[b] = held[b] = len(rows[b]) - self.cache.max_length // 2
        return [row[end:] for row, end in zip(rows, held, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        self.cache = self.cache.select(rows)
        self.starts, self.certain = [self.starts[row] for row in rows], [self.certain[row] for row in rows]
        self.fed = [self.fed[row] for row in rows]


class PromptLookup(Draft):
    """What followed the last time that the row's last `ngram` tokens occurred; failing that, fewer of them."""

    def __init__(self, tokens: int = 4, ngram: int = 3) -> None:
        self.tokens, self.ngram = tokens, ngram

    def start(self, task: Task) -> Drafter:
        return _Lookup(self.ngram, task.batch)


class _Lookup(Drafter):
    """Per row, n-gram -> place behind its last occurrence, of the n-grams that end before the row does."""

    def __init__(self, ngram: int, batch: int) -> None:
        self.ngram = ngram
        self.seen: list[dict[tuple[int, ...], int]] = [{} for _ in range(batch)]
        self.read = [1] * batch

    def propose(self, rows: Rows, counts: Sequence[int], generators: Sequence[torch.Generator]) -> Proposal:
        return Proposal(
            [self._continue(b, row, count) for b, (row, count) in enumerate(zip(rows, counts, strict=True))]
        )

    def _continue(self, b: int, row: Sequence[int], count: int) -> list[int]:
        seen = self.seen[b]
        for end in range(self.read[b], len(row)):
            for n in range(1, min(self.ngram, end) + 1):
                seen[tuple(row[end - n : end])] = end
        self.read[b] = len(row)
        tails = (tuple(row[-n:]) for n in range(min(self.ngram, len(row)), 0, -1))
        place = next((seen[tail] for tail in tails if tail in seen), None)
        if place is None:
            return []
        copied = list(row[place : place + count])
        while len(copied) < count:
            copied.append(copied[len(copied) - (len(row) - place)])
        return copied

    def select(self, rows: Sequence[int]) -> None:
        self.seen, self.read = [self.seen[row] for row in rows], [self.read[row] for row in rows]


class MtpDraft(Draft):
    """The model's own modules of multi-token prediction, one proposed token each."""

    def __init__(self, tokens: int = 4) -> None:
        self.tokens = tokens

    def start(self, task: Task) -> Drafter:
        if not task.model.n_mtp:
            raise UserError(
                "the model has no modules of multi-token prediction to draft with (model.n_mtp is 0);"
                " draft with another model, or with lookup"
            )
        return _MtpDrafter(min(self.tokens, task.model.n_mtp), task)


class _MtpDrafter(Drafter):
    """Module k reads, at each position, the state of module k - 1 there and the token k further on.

    At the end of a row these are its own guesses, so module k's cache is right up to k - 1 positions before that end,
    and every round all modules read the last `depth - 1` positions of the round before again. `states[b]` are what the
    model made of row b's positions from there on, and `read[b]` is how many positions the modules have read.
    """

    def __init__(self, depth: int, task: Task) -> None:
        self.depth, self.task, self.model = depth, task, task.model
        slots = min(self.model.max_length, task.slots)
        self.caches: list[Cache] = [self.model.new_mtp_cache(k, task.batch, slots) for k in range(depth)]
        for cache in self.caches:
            cache.rollback(cache.lengths)  # says now whether its layers can
        self.states: list[torch.Tensor] = []
        self.read = [0] * task.batch

    def observe(self, hidden_BTD: torch.Tensor, counts: Sequence[int], begun: Sequence[bool]) -> None:
        new = [hidden_TD[:count] for hidden_TD, count in zip(hidden_BTD, counts, strict=True)]
        again = [b for b, begins in enumerate(begun) if begins]
        for cache in self.caches:
            cache.reset(again)
        self.read = [0 if begins else read for read, begins in zip(self.read, begun, strict=True)]
        self.states = [
            states_TD if begins else torch.cat((self.states[b], states_TD))
            for b, (states_TD, begins) in enumerate(zip(new, begun, strict=True))
        ]

    def propose(self, rows: Rows, counts: Sequence[int], generators: Sequence[torch.Generator]) -> Proposal:
        starts = [max(0, read - (self.depth - 1)) for read in self.read]
        widths = [len(states_TD) for states_TD in self.states]
        guesses = _Guesses(self.task, rows, [min(count, self.depth) for count in counts], generators)
        hidden_BTD = pad_sequence(self.states, batch_first=True)
        for k in range(self.depth):
            known = [[*row, *own, *[0] * k] for row, own in zip(rows, guesses.tokens, strict=True)]
            ends = [len(row) + k for row in rows]
            blocks = [tokens[end - width : end] for tokens, end, width in zip(known, ends, widths, strict=True)]
            self.caches[k].rollback(starts)
            hidden_BTD, self.caches[k] = self._read(k, hidden_BTD, blocks, self.caches[k])
            guesses.draw(self.model.logits(last(hidden_BTD, widths, 1))[:, 0])
        self.states = [states_TD[max(0, len(states_TD) - self.depth + 1) :] for states_TD in self.states]
        self.read = [start + width for start, width in zip(starts, widths, strict=True)]
        return guesses.proposal()

    def _read(
        self, k: int, hidden_BTD: torch.Tensor, blocks: list[list[int]], cache: Cache
    ) -> tuple[torch.Tensor, Cache]:
        def run(rows: list[int], cache: Cache) -> torch.Tensor:
            tokens_BT, valid_BT = padded([blocks[row] for row in rows], hidden_BTD.device)
            part_BTD = hidden_BTD[rows, : tokens_BT.shape[1]]
            return self.model.mtp_hidden(k, part_BTD, tokens_BT, valid_BT=valid_BT, cache=cache)

        return in_groups(cache, [len(block) for block in blocks], run)

    def select(self, rows: Sequence[int]) -> None:
        self.caches = [cache.select(rows) for cache in self.caches]
        self.states, self.read = [self.states[row] for row in rows], [self.read[row] for row in rows]
