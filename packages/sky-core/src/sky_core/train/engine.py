"""The contract of an engine: who owns devices, precision, gradients and the way state is gathered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


class Engine(ABC):
    """Everything about a step that depends on where and on how many processes it runs.

    The trainer calls `prepare` once, then per step `backward` for each micro-batch and `update` at the end. State
    goes in and out by parameter name as full (gathered) tensors, so a checkpoint does not depend on the engine.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device
    precision: str
    """"fp32" or "bf16": what the forward pass computes in. Parameters and optimizer state stay fp32."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @abstractmethod
    def prepare(
        self, modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer], *, compile: bool
    ) -> dict[str, nn.Module]:
        """Take charge of the modules ("model", "objective") and optimizers; returns the modules to call."""

    @abstractmethod
    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which forward passes run."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients of an already normalised loss; `last` marks the step's last micro-batch."""

    @abstractmethod
    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Scale gradients to at most `max_norm`; returns the global norm before clipping (a scalar tensor)."""

    @abstractmethod
    def update(self, *, skip: bool) -> None:
        """One optimizer step (none when `skip`), then clear the gradients."""

    @abstractmethod
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""

    @abstractmethod
    def model_state(self) -> dict[str, torch.Tensor]:
        """Full parameters and buffers of the model by name, on the main process (others may return nothing)."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Full optimizer state as `<parameter name>/<key>` tensors, on the main process."""

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `optimizer_state`. Raises `CheckpointError` when names or shapes differ."""
