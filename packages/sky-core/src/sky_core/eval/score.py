"""Log-probabilities of given continuations: the one scorer of last-word, cloze and minimal-pair tasks and lm-eval.

For a context c and a continuation w_1 .. w_N the score is Σ_i log p(w_i | c, w_<i), in nats.

Where the tokens of the continuation begin: context and continuation are tokenized as one text, because that is what the
model was trained on, and white space at the context's end goes to the continuation first ("the" + " cat", not
"the " + "cat", whose lone space hardly occurs). What `tokenize(context)` and the whole have in common is context; the
rest is scored. lm-evaluation-harness (Biderman et al. 2024, arXiv:2405.14782) scores the tokens from place
len(tokenize(context)) on: the same, unless a token straddles the border, which it then leaves out and we score whole.

Too long for the model: the *start* of the context is dropped, so that the newest `max_length` tokens before the last
one scored are read (the last one scored is never read itself). An empty context becomes the end-of-text token (or the
token that begins a text, where there is one).

Rows are read longest first, in batches padded on the right, and only scored positions go through the head.

B batch, T time (tokens), N scored positions, D model width, V vocabulary, K numbers per position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sky_core.errors import DataError, UserError
from sky_core.eval.mode import undisturbed

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer

Autocast = Callable[[], AbstractContextManager[Any]]

CHUNK = 1 << 24
"""Logits that are held at a time."""


class Score(NamedTuple):
    """`logprob` (nats) is the sum over the `tokens` of a continuation; `greedy`: each of them is the model's first."""

    logprob: float
    greedy: bool
    tokens: int


class Row(NamedTuple):
    """Tokens that the model reads, and what is asked of its predictions at the last len(targets) of them."""

    tokens: list[int]
    targets: list[int]


def loglikelihoods(
    model: LanguageModel,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    autocast: Autocast = nullcontext,
    *,
    batch_tokens: int = 16384,
) -> list[Score]:
    """The score of each (context, continuation), in the order given. `batch_tokens` bounds the tokens, padding
    included, of one forward pass (at least one row). The model's mode and torch's random state are afterwards what they
    were. Raises `DataError` for an empty continuation and for one longer than the model's context, `UserError` for
    characters that the tokenizer does not have and for an empty context where it has no end-of-text token.
    """
    encoded = [encode_pair(tokenizer, context, continuation) for context, continuation in pairs]
    return score_tokens(model, encoded, autocast, batch_tokens=batch_tokens)


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, longest: int | None = None
) -> tuple[list[int], list[int]]:
    """Tokens of the context (at least one) and of the continuation (at least one; at most `longest`).

    Raises as `loglikelihoods`.
    """
    if not continuation:
        raise DataError(f"nothing follows the context {context[-40:]!r}: a continuation needs at least one character")
    kept = context.rstrip() or context
    head, whole = tokenizer.encode(kept), tokenizer.encode(context + continuation)
    shared = next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole)))
    if shared == len(whole):
        raise DataError(f"the tokenizer has no token for {continuation!r:.40} after {context[-40:]!r}; leave it out")
    if longest is not None:
        _check_length(len(whole) - shared, longest)
    return [*tokenizer.prompt_prefix, *whole[:shared]] or [start_token(tokenizer)], whole[shared:]


def _check_length(tokens: int, longest: int) -> None:
    if tokens > longest:
        raise DataError(
            f"{tokens} tokens are to be predicted in one go, but the model's context is {longest}; leave such items out"
        )


def start_token(tokenizer: Tokenizer) -> int:
    """What stands before a text that nothing precedes: the token that begins a text, or else the one that ends it.

    Raises `UserError` where the tokenizer has neither.
    """
    start = tokenizer.end_of_text if tokenizer.bos is None else tokenizer.bos
    if start is None:
        raise UserError("the tokenizer has no end-of-text token for a text to follow; give the text a context")
    return start


def score_tokens(
    model: LanguageModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    autocast: Autocast = nullcontext,
    *,
    batch_tokens: int = 16384,
) -> list[Score]:
    """`loglikelihoods` of (context, continuation) given as tokens, neither of them empty."""
    rows = [Row([*context, *continuation[:-1]], continuation) for context, continuation in pairs]

    def hits(logprob_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        chosen_N = logprob_NV.gather(-1, targets_N[:, None])[:, 0]
        return torch.stack([chosen_N, (logprob_NV.argmax(-1) == targets_N).float()], dim=-1)

    found = predictions(model, rows, hits, autocast, batch_tokens=batch_tokens)
    return [
        Score(float(numbers_NK[:, 0].double().sum()), bool(numbers_NK[:, 1].all()), len(numbers_NK))
        for numbers_NK in found
    ]


def predictions(
    model: LanguageModel,
    rows: Sequence[Row],
    look: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    autocast: Autocast = nullcontext,
    *,
    batch_tokens: int = 16384,
) -> list[torch.Tensor]:
    """What `look(logprob_NV, targets_N) -> numbers_NK` sees at the scored positions of each row, on the CPU.

    `look` gets positions of many rows at once. Everything else as for `loglikelihoods`.
    """
    longest = model.max_length
    for row in rows:
        _check_length(len(row.targets), longest)
    cut = [row.tokens[-longest:] for row in rows]
    found: list[torch.Tensor | None] = [None] * len(rows)
    with undisturbed(model) as device:
        for batch in batches([len(tokens) for tokens in cut], batch_tokens):
            lengths = [len(cut[i]) for i in batch]
            counts = [len(rows[i].targets) for i in batch]
            width = lengths[0]
            tokens_BT = torch.tensor([cut[i] + [0] * (width - len(cut[i])) for i in batch], device=device)
            last_B = torch.tensor(lengths, device=device)[:, None]
            at_T = torch.arange(width, device=device)
            scored_BT = (at_T < last_B) & (at_T >= last_B - torch.tensor(counts, device=device)[:, None])
            targets_N = torch.tensor([target for i in batch for target in rows[i].targets], device=device)
            with autocast():
                hidden_BTD = model.hidden(tokens_BT, valid_BT=at_T < last_B if lengths[-1] < width else None)
                hidden_ND = hidden_BTD[scored_BT]
                chunk = max(1, CHUNK // model.vocab_size)
                seen = [
                    look(model.logits(hidden_CD[None])[0].float().log_softmax(-1), targets_C)
                    for hidden_CD, targets_C in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
                ]
            for i, numbers_NK in zip(batch, torch.cat(seen).cpu().split(counts), strict=True):
                found[i] = numbers_NK
    return [numbers_NK for numbers_NK in found if numbers_NK is not None]


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows, longest first, in batches of at most `batch_tokens` tokens with their padding (at least one row)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
