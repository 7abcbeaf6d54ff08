"""A sequence while it grows, and what is told of it: token by token (`Piece`) and in the end (`Generation`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from sky_core.errors import SkyError
from sky_core.generation.text_stream import TextStream

Finish = Literal["stop", "length", "end_of_text"]
"""Why a row ended: a stop string, `max_new_tokens`, or the model itself."""


@dataclass(frozen=True)
class Piece:
    """One new token of one row: `text` is what became certain with it, `finish` is set on the row's last token.

    `logprob` (nats) is the token's log-probability in the model's own distribution over its whole vocabulary, before
    temperature and truncation. `accepted` says that a draft had proposed the token; the first token that came of a pass
    of the model says in `proposed` how many the draft had put into that pass.
    """

    row: int
    token: int
    logprob: float
    text: str
    finish: Finish | None
    proposed: int = 0
    accepted: bool = False


@dataclass
class Generation:
    """What followed one prompt. `tokens` and `logprobs` (nats, as in `Piece`) include the token that ended the row;
    `text` ends before a stop string. Of the `proposed` tokens of a draft, `accepted` are among `tokens`."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish = "length"
    proposed: int = 0
    accepted: int = 0

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens.append(piece.token)
        self.logprobs.append(piece.logprob)
        self.finish = piece.finish or self.finish
        self.proposed += piece.proposed
        self.accepted += piece.accepted


class Row:
    """A prompt, what has followed it so far, and the random numbers that decide what comes next."""

    def __init__(
        self, index: int, prompt: Sequence[int], text: TextStream, generator: torch.Generator, max_new_tokens: int
    ) -> None:
        self.index = index
        self.tokens = list(prompt)
        self.text = text
        self.generator = generator
        self.left = max_new_tokens
        self.finish: Finish | None = None

    def take(self, token: int, logprob: float, end_of_text: int | None, *, proposed: int, accepted: bool) -> Piece:
        """One more token; `finish` is set when it is the last."""
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
        return Piece(self.index, token, logprob, text, self.finish, proposed, accepted)
