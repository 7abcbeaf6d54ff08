"""Autoregressive generation with a key/value cache: all prompts at once, until the last row is done.

Without a draft it is a `sky_core.generation.generator.Generator` with as many rows as there are prompts. With one
(`sky_core.generation.speculative`) a pass takes its guesses in as well and chooses among them, so that it brings one
token or several. A row's result depends on its prompt, its index and the seed, never on which other rows are in the
batch. The tokens of greedy decoding are the same with a draft, up to ties of fp32: a pass over several tokens sums in
another order than passes over one.

Past the model's context: a row whose cache is full is read again from the last half of the context (its newest tokens,
at positions from 0) and goes on; `sky_core.generation` logs it once. Up to there nothing differs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sky_core.components.generation import Sample
from sky_core.errors import SkyError, UserError
from sky_core.eval.mode import evaluating
from sky_core.generation.batch import DraftedBatch
from sky_core.generation.generator import Generator
from sky_core.generation.row import Generation, Piece, Row, check_prompt, stop_strings
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
    prefill_chunk: int | None = None,
) -> Iterator[Piece]:
    """Every new token as it comes: one `Piece` per unfinished row and pass, with a draft one or several. Equal prompts
    are prefilled once, and all together or in passes over at most `prefill_chunk` tokens, which bounds their memory.

    Row i draws from its own generator, made of (seed, i). The model is in evaluation mode until the iterator is
    exhausted or closed. Raises `UserError` for a prompt that is empty, longer than the context, or holds ids that the
    model does not know, and for a draft that cannot serve the model or whose guesses it cannot take back; `SkyError`
    where the model gives no finite probability.
    """
    stops = stop_strings(stop)
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}; give 0 or more")
    if draft is not None and prefill_chunk is not None:
        raise UserError("with a draft prompts are read in one pass; leave out prefill_chunk, or the draft")
    for i, prompt in enumerate(prompts):
        check_prompt(f"prompt {i}", prompt, model, model.max_length)
    if not prompts or not max_new_tokens:
        return iter(())
    sampler = sampler or Sample()
    if draft is None:
        generator = Generator(
            model,
            tokenizer,
            rows=len(prompts),
            max_length=min(model.max_length, max(map(len, prompts)) + max_new_tokens),
            prefill_chunk=prefill_chunk,
        )
        for i, prompt in enumerate(prompts):
            generator.submit(prompt, max_new_tokens=max_new_tokens, sampler=sampler, stop=stops, seed=seed, first=i)
        return _sound(generator.stream())
    rows = [
        Row(i, prompt, TextStream(tokenizer, stops), row_generator(seed, i), max_new_tokens, sampler)
        for i, prompt in enumerate(prompts)
    ]
    return _sound(_drafted(model, tokenizer, rows, draft))


def generate_tokens(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], **options: Any
) -> list[Generation]:
    """What follows each prompt of token ids; options and errors as for `stream_tokens`."""
    generations = [Generation() for _ in prompts]
    for piece in stream_tokens(model, tokenizer, prompts, **options):
        generations[piece.row].add(piece)
    return generations


def _sound(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """`pieces` up to the first that is an error."""
    for piece in pieces:
        if piece.error is not None:
            raise SkyError(f"prompt {piece.row}: {piece.error}")
        yield piece


@torch.inference_mode()  # on a generator function, torch leaves the mode whenever a value is handed out
def _drafted(model: LanguageModel, tokenizer: Tokenizer, rows: list[Row], draft: Draft) -> Iterator[Piece]:
    passes = taken = proposed = accepted = 0
    with evaluating(model):
        batch = DraftedBatch(model, tokenizer.vocab_size, rows, draft)
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
    share = 100 * accepted / max(1, proposed)
    log.info(
        "draft: %d of %d tokens accepted (%.0f %%), %.2f tokens per pass of the model",
        accepted, proposed, share, taken / passes,
    )  # fmt: skip
