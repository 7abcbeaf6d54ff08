"""Engines: who owns devices, precision, gradients and the way state is gathered; and the local one.

The trainer hands over one module, `Step`, whose forward is a whole micro-batch (model and objective together): what
DDP, FSDP and DeepSpeed wrap. State goes in and out by parameter name as full tensors, so a checkpoint does not depend
on the engine that wrote it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sky_core.errors import CheckpointError
from sky_core.training.objective import Loss, Objective

if TYPE_CHECKING:
    from sky_core.data.dataset import Batch
    from sky_core.model.language_model import LanguageModel


log = logging.getLogger(__name__)

BuildOptimizers = Callable[[list[tuple[str, nn.Parameter]]], list[torch.optim.Optimizer]]
"""Optimizers of the named parameters that are trained (`slots.Optimizer.build`)."""


class Step(nn.Module):
    """Model, what is attached to it, and objective as one module.

    Names in its state dict start with `model.`, `adapters.` and `objective.`.
    """

    def __init__(self, model: LanguageModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.adapters = nn.ModuleList(attached.module for attached in model.adapters)
        self.objective = objective

    def forward(self, batch: Batch) -> Loss:
        loss: Loss = self.objective(self.model, batch)
        return loss


class Engine(ABC):
    """Everything about a step that depends on where, and on how many processes, it runs.

    The trainer calls `setup` and `prepare` once; then, per step, `loss_of` and `backward` for each micro-batch, `clip`
    and `update`. Losses are normalised over all processes, so gradients are to be *summed* over them, not averaged.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device
    precision: str
    """fp32 or bf16: what the forward pass computes in. Parameters and optimizer state stay fp32."""
    fp8: bool = False
    """Whether linear layers of blocks multiply in fp8 beneath that."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @abstractmethod
    def setup(self, precision: str, *, compile: bool) -> None:
        """Join the other processes, choose device and precision ("auto", "fp32", "bf16", "fp8"), say so in the log.

        Raises `ConfigError` for a precision that this engine or its device does not have.
        """

    optimizers: list[torch.optim.Optimizer]
    """What `prepare` built; the trainer sets the learning rates of their groups."""

    @abstractmethod
    def prepare(self, step: Step, build_optimizers: BuildOptimizers) -> None:
        """Take charge of the step (already on `device`): compile, wrap or shard it, then build the optimizers over the
        named parameters that it has then."""

    @abstractmethod
    def loss_of(self, batch: Batch, *, last: bool) -> Loss:
        """The loss of one micro-batch; `last` marks the step's last one, where gradients are to be reduced."""

    @abstractmethod
    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every use of the model outside of `loss_of` (an objective's `prepare`, evaluation, samples):
        the run's precision, and whole parameters where the engine shards them."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of a loss that is already normalised."""

    @abstractmethod
    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Scale gradients to at most `max_norm` (None: leave them); returns their global norm before that."""

    @abstractmethod
    def update(self, *, skip: bool) -> None:
        """One optimizer step, none when `skip`; then clear the gradients."""

    @abstractmethod
    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of a tensor on `device`."""

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """The sum over all processes of each of some numbers of this host."""
        if self.world_size == 1:
            return list(numbers)
        totals: list[float] = self.sum(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()
        return totals

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process: what all of them must decide alike."""
        return flag if self.world_size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)))

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Full state dict of the step on the main process."""

    @abstractmethod
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`; names and shapes are known to fit."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Full optimizer state on the main process, as `<parameter name>/<key>`."""

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `optimizer_state`. Raises `CheckpointError` when names or shapes differ."""


class LocalEngine(Engine):
    """One process, one device: CUDA where there is one, else the CPU."""

    def setup(self, precision: str, *, compile: bool) -> None:
        from sky_core.training.precision import resolve_precision

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.fp8 = precision == "fp8"
        if self.fp8:
            from sky_core.training.fp8 import require_fp8

            require_fp8(self.device)
        self.precision = resolve_precision("bf16" if self.fp8 else precision, self.device)
        self.compile = compile
        log.info("engine local on %s", self.device)
        if compile:
            from sky_core.compilation import keep_compiled_code

            log.info("layers are compiled at their first step; compiled code is kept in %s", keep_compiled_code())

    def prepare(self, step: Step, build_optimizers: BuildOptimizers) -> None:
        self.step = step
        if self.fp8:
            from sky_core.training.fp8 import use_fp8

            use_fp8(step.model.get_submodule("layers"))
        if self.compile:
            step.model.compile_layers()
        named = [(name, parameter) for name, parameter in step.named_parameters() if parameter.requires_grad]
        self.optimizers = build_optimizers(named)
        self.trained = [parameter for _, parameter in named]

    def loss_of(self, batch: Batch, *, last: bool) -> Loss:
        with self.autocast():
            loss: Loss = self.step(batch)
        return loss

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip(self, max_norm: float | None) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(self.trained, float("inf") if max_norm is None else max_norm)

    def update(self, *, skip: bool) -> None:
        for optimizer in self.optimizers:
            if not skip:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def state(self) -> dict[str, torch.Tensor]:
        return self.step.state_dict()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.step.load_state_dict(state)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        names = {parameter: name for name, parameter in self.step.named_parameters()}
        return {
            f"{names[parameter]}/{key}": value
            for optimizer in self.optimizers
            for parameter, entries in optimizer.state.items()
            for key, value in entries.items()
        }

    def load_optimizer_state(self, state: dict[str, torch.Tensor]) -> None:
        parameters = dict(self.step.named_parameters())
        owner = {
            parameter: (optimizer, group)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for path, tensor in state.items():
            name, _, key = path.rpartition("/")
            parameter = parameters.get(name)
            if parameter is None or parameter not in owner:
                raise CheckpointError(
                    f"optimizer state of {name!r} has no trained parameter here; was the model changed?"
                )
            if tensor.ndim and tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"optimizer state {path!r} has shape {tuple(tensor.shape)}, its parameter {tuple(parameter.shape)}"
                )
            optimizer, group = owner[parameter]
            on_device = tensor.ndim > 0 or group.get("fused") or group.get("capturable")
            optimizer.state[parameter][key] = tensor.to(parameter.device if on_device else "cpu", copy=True)
