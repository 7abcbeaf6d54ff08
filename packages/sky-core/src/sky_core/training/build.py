"""From a run file to a model: architecture, start weights, adapters."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sky_core.errors import UserError
from sky_core.plugins import loaded_plugins
from sky_core.training.checkpoint import load_weights
from sky_core.training.load import load

if TYPE_CHECKING:
    from sky_core.config import Run
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer

log = logging.getLogger(__name__)


def build_model(run: Run, tokenizer: Tokenizer, *, fresh: bool) -> LanguageModel:
    """The run's model on the CPU: built from its seed, then `init:` weights (when it starts afresh), then `adapters:`.

    Raises `UserError` when `init:` has adapters, another tokenizer or another shape.
    """
    torch.manual_seed(run.seed)
    model: LanguageModel = run.model.build(tokenizer.vocab_size)
    if run.init is not None and fresh:
        other, other_tokenizer = load(run.init)
        if other_tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"init: {run.init} was trained with tokenizer {other_tokenizer.fingerprint}, this run has"
                f" {tokenizer.fingerprint}; use the data and tokenizer that it was trained with"
            )
        if other.adapters:
            raise UserError(f"init: {run.init} has adapters, which would be lost; start from the run that they adapt")
        load_weights(model, other.state_dict(), Path(run.init))
        log.info("weights start from %s", run.init)
    for adapter in run.adapters:
        adapter.build(model)
    loaded_plugins().hook.sky_model_built(model=model, run=run)
    return model
