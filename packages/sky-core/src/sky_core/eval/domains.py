"""Bits per byte on the user's own texts, domain by domain.

Each document is read behind the end-of-text token (without one, its first token is no target) in windows of the model's
context; the first token of a later window is predicted from the last one of the window before alone. Special tokens are
no targets: the bits are those of the text, the bytes its UTF-8 length.

Standard errors are over windows (`sky_core.eval.statistics`): a domain of many documents that fit into one is measured
over documents.

B batch (windows), T time (tokens).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sky_core.data.dataset import IGNORE, Batch
from sky_core.data.read import Corpus, Document
from sky_core.errors import DataError, UserError
from sky_core.eval.loss import measure
from sky_core.eval.score import Autocast

if TYPE_CHECKING:
    from sky_core.components.evaluation import Domains
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer


def domains(
    model: LanguageModel,
    tokenizer: Tokenizer,
    _dataset: Any = None,
    autocast: Autocast = nullcontext,
    *,
    options: Domains,
) -> dict[str, float]:
    """`bits_per_byte` with its standard error, `bytes` and `sequences`, each as `<options.name>/<domain>/<metric>`.

    Raises `DataError` when a text cannot be read or holds nothing to predict.
    """
    results: dict[str, float] = {}
    for domain, documents in _by_domain(options).items():
        windows = [window for document in documents for window in _windows(tokenizer, document, model.max_length)]
        sums = measure(model, tokenizer, _batches(windows, options.batch_tokens), autocast)
        if not sum(sums.bytes):
            raise DataError(f"{options.name}: domain {domain!r} holds no token to predict; give it more text")
        results |= {f"{options.name}/{domain}/{metric}": value for metric, value in sums.compression().items()}
    return results


def _by_domain(options: Domains) -> dict[str, list[Document]]:
    """The documents of each domain, up to `max_bytes` of it."""
    found: dict[str, list[Document]] = defaultdict(list)
    room: dict[str, int] = defaultdict(lambda: options.max_bytes)
    named = options.path if isinstance(options.path, dict) else {"": options.path}
    for name, paths in named.items():
        for document in Corpus([paths] if isinstance(paths, str) else paths):
            domain = (name or document.domain or Path(document.source).name.partition(".")[0]).replace("/", "-")
            text = document.text.encode()[: room[domain]].decode(errors="ignore")
            if text:
                found[domain].append(replace(document, text=text))
            room[domain] = max(0, room[domain] - len(document.text.encode()))
            if name and not room[name]:
                break  # all that follows is of the same domain
    return found


def _windows(tokenizer: Tokenizer, document: Document, length: int) -> Iterator[list[int]]:
    """The document's tokens in windows of at most `length` inputs and their targets; the last token of one window is
    the first of the next."""
    start = list(tokenizer.prompt_prefix) or ([] if tokenizer.end_of_text is None else [tokenizer.end_of_text])
    try:
        tokens = [*start, *tokenizer.encode(document.text)]
    except UserError as error:
        raise DataError(f"{document.source}: {error}") from error
    for first in range(0, len(tokens) - 1, length):
        yield tokens[first : first + length + 1]


def _batches(windows: list[list[int]], batch_tokens: int) -> Iterator[Batch]:
    """Windows, longest first, padded on the right: attention is causal, and no target stands on padding."""
    ordered = sorted(windows, key=len, reverse=True)
    while ordered:
        width = len(ordered[0]) - 1
        batch, ordered = ordered[: max(1, batch_tokens // width)], ordered[max(1, batch_tokens // width) :]
        tokens_BT = torch.zeros(len(batch), width, dtype=torch.long)
        targets_BT = torch.full_like(tokens_BT, IGNORE)
        for b, window in enumerate(batch):
            tokens_BT[b, : len(window) - 1] = torch.tensor(window[:-1])
            targets_BT[b, : len(window) - 1] = torch.tensor(window[1:])
        yield Batch(tokens_BT, targets_BT)
