"""Looking at a model without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sky_core.model.language_model import LanguageModel


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """The model and its adapters in evaluation mode; afterwards every module is in the mode it was in."""
    roots = [model, *(attached.module for attached in model.adapters)]
    training = [module for root in roots for module in root.modules() if module.training]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def undisturbed(model: LanguageModel) -> Iterator[torch.device]:
    """`evaluating` without gradients; torch's random generators are afterwards what they were. Gives the device."""
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=cuda):
        yield device
