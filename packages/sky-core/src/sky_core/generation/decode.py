"""Autoregressive generation with a key/value cache: prefill, step, and the loop around them.

`prefill` takes whole prompts of different lengths (padded on the right), `step` one token per row; the loop samples,
decides which rows are finished, drops those from the batch and streams the rest. A row's result depends on its
prompt, its index and the seed, never on which other rows are in the batch.

Past the model's context: a row whose cache is full is prefilled again with the last half of the context (its newest
tokens, at positions from 0) and goes on; `sky_core.generation` logs it once. Up to there nothing differs.

B rows, T time (tokens), D model width, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from sky_core.components.generation import Sample
from sky_core.errors import SkyError, UserError
from sky_core.eval.mode import evaluating
from sky_core.generation.sampling import row_generator
from sky_core.generation.text_stream import TextStream
from sky_core.model.cache import Cache

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel
    from sky_core.slots import Sampler
    from sky_core.tokenizer.base import Tokenizer

log = logging.getLogger("sky_core.generation")

Finish = Literal["stop", "length", "end_of_text"]
"""Why a row ended: a stop string, `max_new_tokens`, or the model itself."""


@dataclass(frozen=True)
class Piece:
    """One new token of one row: `text` is what became certain with it, `finish` is set on the row's last token.

    `logprob` (nats) is the token's log-probability in the model's own distribution over its whole vocabulary, before
    temperature and truncation.
    """

    row: int
    token: int
    logprob: float
    text: str
    finish: Finish | None


@dataclass
class Generation:
    """What followed one prompt. `tokens` and `logprobs` (nats, as in `Piece`) include the token that ended the row;
    `text` ends before a stop string."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish = "length"


# The two passes through the model. Both advance `cache` and return logits_BV of each row's next token.


def prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], cache: Cache) -> torch.Tensor:
    """Take each row's prompt (at least one token) into the cache."""
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    tokens_BT = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    last_B = torch.tensor(lengths, device=device) - 1
    ragged = min(lengths) < longest
    valid_BT = torch.arange(longest, device=device) <= last_B[:, None] if ragged else None
    hidden_BTD = model.hidden(tokens_BT, valid_BT=valid_BT, cache=cache)
    hidden_B1D = hidden_BTD[torch.arange(len(prompts), device=device), last_B][:, None]
    return model.logits(hidden_B1D)[:, 0]


def step(model: LanguageModel, tokens_B: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Take one more token of each row into the cache."""
    return model.logits(model.hidden(tokens_B[:, None], cache=cache))[:, 0]


def join(first: Cache, second: Cache) -> Cache:
    """One cache with the rows of both; they must have been made by one model for the same `max_length`."""
    pairs = [(first.layers, second.layers), (first.memories, second.memories)]
    states: list[list[Any]] = [
        [
            a
            and b
            and a.replace({name: torch.cat([tensor, b.tensors()[name]]) for name, tensor in a.tensors().items()})
            for a, b in zip(mine, theirs, strict=True)
        ]
        for mine, theirs in pairs
    ]
    return Cache([*first.lengths, *second.lengths], first.max_length, *states)


class _Row:
    """A sequence while it grows."""

    def __init__(
        self, index: int, prompt: Sequence[int], text: TextStream, generator: torch.Generator, max_new_tokens: int
    ) -> None:
        self.index = index
        self.tokens = list(prompt)
        self.text = text
        self.generator = generator
        self.left = max_new_tokens
        self.finish: Finish | None = None

    def take(self, token: int, logprob: float, end_of_text: int | None) -> Piece:
        if not math.isfinite(logprob):
            raise SkyError(
                f"prompt {self.index}: the model gives no finite probability for token {len(self.tokens)}; "
                "its weights are damaged or have diverged"
            )
        self.tokens.append(token)
        self.left -= 1
        text = self.text.push(token)
        if token == end_of_text:
            self.finish = "end_of_text"
        elif self.text.stopped:
            self.finish = "stop"
        elif self.left == 0:
            self.finish = "length"
        if self.finish in ("end_of_text", "length"):
            text += self.text.flush()
        return Piece(self.index, token, logprob, text, self.finish)


def stream_tokens(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    sampler: Sampler | None = None,
    max_new_tokens: int = 200,
    stop: str | Sequence[str] = (),
    seed: int = 0,
) -> Iterator[Piece]:
    """Every new token as it comes: one `Piece` per unfinished row and step. Equal prompts are prefilled once.

    Row i draws from its own generator, made of (seed, i). The model is in evaluation mode until the iterator is
    exhausted or closed. Raises `UserError` for a prompt that is empty, longer than the context, or holds ids that the
    model does not know.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise UserError("a stop string is empty; leave it out or give at least one character")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}; give 0 or more")
    for i, prompt in enumerate(prompts):
        _check_prompt(model, i, prompt)
    rows = [
        _Row(i, prompt, TextStream(tokenizer, stops), row_generator(seed, i), max_new_tokens)
        for i, prompt in enumerate(prompts)
    ]
    return _decode(model, tokenizer, rows, (sampler or Sample()).build()) if rows and max_new_tokens else iter(())


def _check_prompt(model: LanguageModel, i: int, prompt: Sequence[int]) -> None:
    if not prompt:
        raise UserError(f"prompt {i} is empty; give at least one token")
    if len(prompt) > model.max_length:
        raise UserError(
            f"prompt {i} has {len(prompt)} tokens, more than the model's context of {model.max_length}; shorten it"
        )
    if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
        raise UserError(
            f"prompt {i} holds a token outside the model's vocabulary of {model.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


@torch.inference_mode()  # on a generator function, torch leaves the mode whenever a value is handed out
def _decode(
    model: LanguageModel, tokenizer: Tokenizer, rows: list[_Row], choose: Callable[..., torch.Tensor]
) -> Iterator[Piece]:
    with evaluating(model):
        prompts = list(dict.fromkeys(tuple(row.tokens) for row in rows))
        slots = max(len(row.tokens) + row.left for row in rows)
        cache = model.new_cache(len(prompts), min(model.max_length, slots))
        logits_BV = prefill(model, prompts, cache)
        if len(prompts) < len(rows):
            where = {prompt: i for i, prompt in enumerate(prompts)}
            copies = [where[tuple(row.tokens)] for row in rows]
            cache, logits_BV = cache.select(copies), logits_BV[copies]
        slid = False
        while True:
            logits_BV = logits_BV.float()
            real_BV = logits_BV[:, : tokenizer.vocab_size]  # a padded vocabulary ends in ids that stand for nothing
            next_B = choose(real_BV, [row.tokens for row in rows], [row.generator for row in rows])
            logprob_B = logits_BV.gather(-1, next_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
            for row, token, logprob in zip(rows, next_B.tolist(), logprob_B.tolist(), strict=True):
                yield row.take(token, logprob, tokenizer.end_of_text)
            going = [i for i, row in enumerate(rows) if row.finish is None]
            if not going:
                return
            if len(going) < len(rows):
                rows, next_B, cache = [rows[i] for i in going], next_B[going], cache.select(going)
            full = [i for i, length in enumerate(cache.lengths) if length == cache.max_length]
            if not full:
                logits_BV = step(model, next_B, cache)
                continue
            if not slid:
                slid = True
                log.info(_SLIDING, cache.max_length, _kept(cache))
            order, logits_BV, cache = _slide(model, rows, next_B, cache, full)
            rows = [rows[i] for i in order]


_SLIDING = "generating past the context of %d tokens: a full row goes on from its last %d tokens"


def _kept(cache: Cache) -> int:
    return max(1, cache.max_length // 2)


def _slide(
    model: LanguageModel, rows: list[_Row], next_B: torch.Tensor, cache: Cache, full: list[int]
) -> tuple[list[int], torch.Tensor, Cache]:
    """One step of a batch in which the rows `full` have no slot left: the order of rows from now on, logits, cache."""
    fresh = model.new_cache(len(full), cache.max_length)
    logits_BV = prefill(model, [rows[i].tokens[-_kept(cache) :] for i in full], fresh)
    others = [i for i in range(len(rows)) if i not in full]
    if not others:
        return full, logits_BV, fresh
    cache = cache.select(others)
    logits_BV = torch.cat([step(model, next_B[others], cache), logits_BV])
    return others + full, logits_BV, join(cache, fresh)


def generate_tokens(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], **options: Any
) -> list[Generation]:
    """What follows each prompt of token ids; options and errors as for `stream_tokens`."""
    generations = [Generation() for _ in prompts]
    for piece in stream_tokens(model, tokenizer, prompts, **options):
        generation = generations[piece.row]
        generation.text += piece.text
        generation.tokens.append(piece.token)
        generation.logprobs.append(piece.logprob)
        generation.finish = piece.finish or generation.finish
    return generations
