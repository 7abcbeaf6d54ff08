"""An exponential moving average of the parameters, to evaluate and to keep (Polyak & Juditsky 1992).

    s_n = d_n s_{n-1} + (1 - d_n) θ_n,     d_n = min(decay, (1 + n) / (10 + n))

The warm-up of the decay (as in TensorFlow's ExponentialMovingAverage) lets the average follow the first, fast steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sky_core.errors import CheckpointError

COUNT = "n_updates"


class EMA:
    """The average of every trainable parameter of `model`; buffers and frozen parameters are the model's own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.n_updates = 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now; call once after each optimizer step."""
        self.n_updates += 1
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model holds the averages inside, its own parameters (the same tensors, bit for bit) after."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name, and the number of updates as `n_updates`."""
        return {**self.average, COUNT: torch.tensor(self.n_updates)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state_dict`. Raises `CheckpointError`, with nothing changed, when names or shapes differ."""
        averages = {name: value for name, value in state.items() if name != COUNT}
        if COUNT not in state or averages.keys() != self.average.keys():
            different = sorted({*state} ^ {*self.average, COUNT})
            raise CheckpointError(f"averaged weights do not fit this model: {different[0]!r} is on one side only")
        for name, value in averages.items():
            own = self.average[name].shape
            if value.shape != own:
                raise CheckpointError(
                    f"averaged weight {name}: shape {tuple(value.shape)}, the model's is {tuple(own)}"
                )
        for name, value in averages.items():
            self.average[name].copy_(value)
        self.n_updates = int(state[COUNT])
