"""Autoregressive generation with a key/value cache: the loop around the passes of `sky_core.generation.passes`.

Each round chooses tokens from the logits of the last pass, hands them out, drops the rows that are finished and takes
the others' tokens into the cache. A row's result depends on its prompt, its index and the seed, never on which other
rows are in the batch. With a draft (`sky_core.generation.speculative`) a round takes its guesses in as well and chooses
among them, so that a pass brings one token or several. The tokens of greedy decoding stay the same, up to ties of fp32:
a pass over several tokens sums in another order than passes over one.

Past the model's context: a row whose cache is full is read again from the last half of the context (its newest tokens,
at positions from 0) and goes on; `sky_core.generation` logs it once. Up to there nothing differs.

B rows, T time (tokens), K places (guesses and the token after them), D model width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sky_core.components.generation import Sample
from sky_core.errors import UserError
from sky_core.eval.mode import evaluating
from sky_core.generation.batch import RowBatch
from sky_core.generation.row import Generation, Piece, Row
from sky_core.generation.sampling import row_generator
from sky_core.generation.text_stream import TextStream

if TYPE_CHECKING:
    from sky_core.generation.speculative import Draft
    from sky_core.model.language_model import LanguageModel
    from sky_core.slots import Sampler
    from sky_core.tokenizer.base import Tokenizer

log = logging.getLogger("sky_core.generation")


def stream_tokens(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    sampler: Sampler | None = None,
    max_new_tokens: int = 200,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    draft: Draft | None = None,
) -> Iterator[Piece]:
    """Every new token as it comes: one `Piece` per unfinished row and pass, with a draft one or several. Equal prompts
    are prefilled once.

    Row i draws from its own generator, made of (seed, i). The model is in evaluation mode until the iterator is
    exhausted or closed. Raises `UserError` for a prompt that is empty, longer than the context, or holds ids that the
    model does not know, and for a draft that cannot serve the model or whose guesses it cannot take back.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise UserError("a stop string is empty; leave it out or give at least one character")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}; give 0 or more")
    for i, prompt in enumerate(prompts):
        _check_prompt(model, i, prompt)
    if not prompts or not max_new_tokens:
        return iter(())
    rows = [
        Row(i, prompt, TextStream(tokenizer, stops), row_generator(seed, i), max_new_tokens)
        for i, prompt in enumerate(prompts)
    ]
    return _decode(model, tokenizer, rows, (sampler or Sample()).build(), draft)


def generate_tokens(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], **options: Any
) -> list[Generation]:
    """What follows each prompt of token ids; options and errors as for `stream_tokens`."""
    generations = [Generation() for _ in prompts]
    for piece in stream_tokens(model, tokenizer, prompts, **options):
        generations[piece.row].add(piece)
    return generations


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
    model: LanguageModel,
    tokenizer: Tokenizer,
    rows: list[Row],
    choose: Callable[..., torch.Tensor],
    draft: Draft | None,
) -> Iterator[Piece]:
    passes = taken = proposed = accepted = 0
    with evaluating(model):
        batch = RowBatch(model, tokenizer.vocab_size, rows, choose, draft)
        while batch.rows:
            for row, drafted, tokens, logprobs in batch.choose():
                passes, proposed = passes + 1, proposed + drafted
                for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
                    of_draft = place < len(tokens) - 1
                    taken, accepted = taken + 1, accepted + of_draft
                    offered = 0 if place else drafted
                    yield row.take(token, logprob, tokenizer.end_of_text, proposed=offered, accepted=of_draft)
                    if row.finish is not None:
                        break
            batch.advance()
    if draft is not None:
        share = 100 * accepted / max(1, proposed)
        log.info(
            "draft: %d of %d tokens accepted (%.0f %%), %.2f tokens per pass of the model",
            accepted, proposed, share, taken / passes,
        )  # fmt: skip
