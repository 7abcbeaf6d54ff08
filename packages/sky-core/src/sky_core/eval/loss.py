"""Loss on the whole validation split, in units that compare across batch sizes and tokenizers.

    loss           = Σ nll / tokens             nats per token
    perplexity     = exp(loss)
    bits_per_byte  = Σ nll / (ln 2 · bytes)     bytes: UTF-8 length of the target tokens

Special tokens stand for no bytes, yet what it costs to predict them is counted: bits per byte is the size to which
the model compresses the split, document ends included.

B batch (sequences), T time (tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from sky_core.data.dataset import IGNORE, Batch, Dataset
from sky_core.errors import DataError
from sky_core.eval.mode import evaluating

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer


def validation_loss(
    model: LanguageModel,
    tokenizer: Tokenizer,
    dataset: Dataset,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    batch_tokens: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """`loss`, `perplexity`, `bits_per_byte`, `tokens` and `bytes` of every target of the validation split.

    `batch_tokens` bounds the tokens of one forward pass (at least one sequence); `progress` is called with the
    tokens done after each. The model's mode and torch's random state are afterwards what they were. Raises
    `DataError` when there is no validation split.
    """
    device = next(model.parameters()).device
    token_bytes_V = torch.tensor(tokenizer.token_bytes())
    nll = torch.zeros((), dtype=torch.float64, device=device)
    tokens = n_bytes = 0
    cuda = [device] if device.type == "cuda" else []
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=cuda):
        for batch in dataset.validation(max(1, batch_tokens // dataset.sequence_length)):
            targets_N = batch.targets_BT[batch.targets_BT != IGNORE]
            tokens += len(targets_N)
            n_bytes += int(token_bytes_V[targets_N].sum())
            with autocast():
                nll += _nll(model, batch.to(device))
            if progress is not None:
                progress(tokens)
    if n_bytes == 0:
        raise DataError("the validation split holds no text; give it more documents or a larger share")
    loss = nll.item() / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nll.item() / (math.log(2) * n_bytes),
        "tokens": float(tokens),
        "bytes": float(n_bytes),
    }


def _nll(model: LanguageModel, batch: Batch) -> torch.Tensor:
    hidden_BTD = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
    return model.nll(hidden_BTD, batch.targets_BT)
