"""Loss on the whole validation split, in units that compare across batch sizes and tokenizers.

    loss           = Σ nll / tokens             nats per token
    perplexity     = exp(loss)
    bits_per_byte  = Σ nll / (ln 2 · bytes)     bytes: UTF-8 length of the target tokens

Special tokens stand for no bytes, yet what it costs to predict them is counted: bits per byte is the size to which
the model compresses the split, document ends included.

Standard errors are over sequences (`sky_core.eval.statistics`), that of the perplexity by the delta method:
perplexity · s.e.(loss). Where the dataset has domains (a mixture), each has its own bits per byte.

B batch (sequences), T time (tokens), C tokens of a chunk, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from sky_core.data.dataset import IGNORE, Batch, Dataset
from sky_core.errors import DataError
from sky_core.eval.mode import undisturbed
from sky_core.eval.score import CHUNK, Autocast
from sky_core.eval.statistics import named, ratio_stderr

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer

Progress = Callable[[int], None]


@dataclass
class Sums:
    """What each sequence cost (nats), its target tokens, and the bytes that they stand for."""

    nll: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def add(self, nll: list[float], tokens: list[int], bytes: list[int]) -> None:
        self.nll += nll
        self.tokens += tokens
        self.bytes += bytes

    def loss(self) -> dict[str, float]:
        """`loss`, `perplexity`, `bits_per_byte` with their standard errors, `tokens`, `bytes` and `sequences`."""
        loss, stderr = ratio_stderr(self.nll, self.tokens)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {
            **named("loss", loss, stderr),
            **named("perplexity", perplexity, None if stderr is None else perplexity * stderr),
            **self.compression(),
            "tokens": float(sum(self.tokens)),
        }

    def compression(self) -> dict[str, float]:
        """`bits_per_byte` with its standard error, `bytes` and `sequences`."""
        bits = [nll / math.log(2) for nll in self.nll]
        return {
            **named("bits_per_byte", *ratio_stderr(bits, self.bytes)),
            "bytes": float(sum(self.bytes)),
            "sequences": float(len(self.nll)),
        }


def validation_loss(
    model: LanguageModel,
    tokenizer: Tokenizer,
    dataset: Dataset,
    autocast: Autocast = nullcontext,
    *,
    batch_tokens: int = 16384,
    progress: Progress | None = None,
) -> dict[str, float]:
    """`Sums.loss` over every target of the validation split, and `loss/<domain>/...` (`Sums.compression`) of each
    domain that the dataset tells apart.

    `batch_tokens` bounds the tokens of one forward pass (at least one sequence); `progress` is called with the
    tokens done after each. The model's mode and torch's random state are afterwards what they were. Raises
    `DataError` when there is no validation split, or no text in it.
    """
    rows = max(1, batch_tokens // dataset.sequence_length)
    domains = dataset.domains() or {"": dataset}
    total, done = Sums(), 0
    by_domain: dict[str, float] = {}

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(done)

    for domain, part in domains.items():
        sums = measure(model, tokenizer, part.validation(rows), autocast, advance)
        if not sum(sums.bytes):
            of = f" of domain {domain!r}" if domain else ""
            raise DataError(f"the validation split{of} holds no text; give it more documents or a larger share")
        by_domain |= {f"loss/{domain}/{name}": value for name, value in sums.compression().items()}
        total.add(sums.nll, sums.tokens, sums.bytes)
    return total.loss() | (by_domain if dataset.domains() else {})


def measure(
    model: LanguageModel,
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    autocast: Autocast = nullcontext,
    progress: Progress | None = None,
) -> Sums:
    """What each sequence of `batches` costs; those without a target are left out. `progress` is called with the target
    tokens of each batch."""
    token_bytes_V = torch.tensor(tokenizer.token_bytes())
    sums = Sums()
    with undisturbed(model) as device:
        for batch in batches:
            mask_BT = batch.targets_BT != IGNORE
            tokens_B = mask_BT.sum(1)
            bytes_B = (token_bytes_V[batch.targets_BT.where(mask_BT, 0)] * mask_BT).sum(1)
            with autocast():
                nll_B = _nll(model, batch.to(device))
            kept_B = tokens_B > 0
            sums.add(nll_B[kept_B].tolist(), tokens_B[kept_B].tolist(), bytes_B[kept_B].tolist())
            if progress is not None:
                progress(int(tokens_B.sum()))
    return sums


def _nll(model: LanguageModel, batch: Batch) -> torch.Tensor:
    """Nats of each sequence, in float64 on the CPU; at most CHUNK logits are held at a time."""
    hidden_BTD = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
    rows = max(1, CHUNK // model.vocab_size)
    chunks = zip(hidden_BTD.flatten(0, 1).split(rows), batch.targets_BT.flatten().split(rows), strict=True)
    parts = [
        F.cross_entropy(model.logits(hidden_CD[None])[0].float(), targets_C, ignore_index=IGNORE, reduction="none")
        for hidden_CD, targets_C in chunks
    ]
    return torch.cat(parts).view(batch.targets_BT.shape).double().sum(1).cpu()
