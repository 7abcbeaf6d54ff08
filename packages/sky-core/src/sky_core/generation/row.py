"""A sequence while it grows, and what is told of it: token by token (`Piece`) and in the end (`Generation`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from sky_core.errors import UserError
from sky_core.generation.text_stream import TextStream

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel
    from sky_core.slots import Sampler

SLIDING = "generating past the context of %d tokens: a full row goes on from its last %d tokens"

Finish = Literal["stop", "length", "end_of_text", "cancelled", "failed"]
"""Why a row ended: a stop string, `max_new_tokens`, or the model itself; or it was taken back, or went wrong."""


@dataclass(frozen=True)
class Piece:
    """One new token of one row: `text` is what became certain with it, `finish` is set on the row's last token.

    `logprob` (nats) is the token's log-probability in the model's own distribution over its whole vocabulary, before
    temperature and truncation. `accepted` says that a draft had proposed the token; the first token that came of a pass
    of the model says in `proposed` how many the draft had put into that pass. `request` is the id that a `Generator`
    gave out, `row` the prompt or, of a request for several samples, the sample. Where a row failed, `error` says why:
    the piece then brings the text that was held back and no token (-1).
    """

    row: int
    token: int
    logprob: float
    text: str
    finish: Finish | None
    proposed: int = 0
    accepted: bool = False
    request: int = 0
    error: str | None = None


@dataclass
class Generation:
    """What followed one prompt. `tokens` and `logprobs` (nats, as in `Piece`) include the token that ended the row;
    `text` ends before a stop string. Of the `proposed` tokens of a draft, `accepted` are among `tokens`. `error` says
    why a row failed; what came before stands."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish = "length"
    proposed: int = 0
    accepted: int = 0
    error: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        if piece.error is None:
            self.tokens.append(piece.token)
            self.logprobs.append(piece.logprob)
        self.finish = piece.finish or self.finish
        self.proposed += piece.proposed
        self.accepted += piece.accepted
        self.error = piece.error


class Row:
    """A prompt, what has followed it so far, and what decides the next token: `choose`, the built sampler, and the
    random numbers of `generator`. The model reads `tokens` from `start` on, which is 0 until the row outgrows the
    model's context."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        text: TextStream,
        generator: torch.Generator,
        max_new_tokens: int,
        sampler: Sampler,
        request: int = 0,
    ) -> None:
        self.request, self.index = request, index
        self.tokens = list(prompt)
        self.start = 0
        self.text = text
        self.generator = generator
        self.left = max_new_tokens
        self.sampler, self.choose = sampler, sampler.build()
        self.finish: Finish | None = None
        self.generation = Generation()

    @property
    def context(self) -> list[int]:
        return self.tokens[self.start :]

    def take(
        self, token: int, logprob: float, end_of_text: int | None, *, proposed: int = 0, accepted: bool = False
    ) -> Piece:
        """One more token; `finish` is set when it is the last."""
        if not math.isfinite(logprob):
            return self._fail(
                f"the model gives no finite probability for token {len(self.tokens)}; "
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
        return self._told(Piece(self.index, token, logprob, text, self.finish, proposed, accepted, self.request))

    def _fail(self, error: str) -> Piece:
        self.finish = "failed"
        piece = Piece(self.index, -1, math.nan, self.text.flush(), "failed", request=self.request, error=error)
        return self._told(piece)

    def _told(self, piece: Piece) -> Piece:
        self.generation.add(piece)
        return piece


def check_prompt(name: str, prompt: Sequence[int], model: LanguageModel, limit: int) -> None:
    """Raise `UserError`, calling the prompt `name`, unless the model can read it and it has at most `limit` tokens."""
    if not prompt:
        raise UserError(f"{name} is empty; give at least one token")
    if len(prompt) > limit:
        whose = "model's context" if limit == model.max_length else "generator's max_length"
        raise UserError(f"{name} has {len(prompt)} tokens, more than the {whose} of {limit}; shorten it")
    if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
        raise UserError(
            f"{name} holds a token outside the model's vocabulary of {model.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """`stop` as several strings. Raises `UserError` for an empty one."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise UserError("a stop string is empty; leave it out or give at least one character")
    return stops
