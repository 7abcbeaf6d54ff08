"""The protocol of a contender: one model, the same weights for all, trained and decoded as its users would.

    one = contender("transformers")(model, "cpu")        # built from our model, which it does not keep
    one.prepare_training("bf16", compile=True)
    one.loss(tokens_BT, targets_BT); one.train_step(tokens_BT, targets_BT)
    one.prepare_decoding("bf16", compile=False, batch=8, length=512)
    one.generate(prompts, 64)

Training: parameters and AdamW's state in fp32, "bf16" being autocast over these; gradients clipped at 1; one fused
AdamW for all parameters without weight decay, so that equal models take equal steps. Decoding: weights cast to the
precision, greedy.

B batch, T time (tokens).
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from sky_core.errors import UserError

if TYPE_CHECKING:
    from sky_core.model.decoder import DecoderLM

ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
CLIP = 1.0

Prompts = Sequence[Sequence[int]]


class Contender(ABC):
    """One model of one library on one device."""

    name: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]] = ()
    """Modules that must be importable, the library itself first."""
    distributions: ClassVar[tuple[str, ...]] = ()
    install: ClassVar[str] = ""
    """What to type when a library is missing."""

    model: nn.Module

    def __init__(self, model: DecoderLM, device: str) -> None:
        self.device = device
        self.precision = "fp32"
        self.vocab_size = model.vocab_size

    @classmethod
    def require(cls) -> None:
        """Raise `UserError` with what to install where a library is missing."""
        for library in cls.libraries:
            try:
                importlib.import_module(library)
            except ImportError as error:
                missing = error.name or library
                raise UserError(f"{cls.name}: {missing} is not installed; {cls.install}") from error

    @property
    def parameters(self) -> int:
        """Distinct parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    # ------------------------------------------------------------------------------------------ training

    @abstractmethod
    def prepare_training(self, precision: str, *, compile: bool) -> None:
        """Get ready for `loss` and `train_step` in "fp32" or "bf16", compiled as the library's users would."""

    @abstractmethod
    def loss(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> float:
        """Mean nats per target, without gradients and uncompiled, in the precision that was prepared."""

    @abstractmethod
    def train_step(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> None:
        """Forward, backward, clipping, AdamW, cleared gradients."""

    # ------------------------------------------------------------------------------------------ decoding

    @abstractmethod
    def prepare_decoding(self, precision: str, *, compile: bool, batch: int, length: int) -> None:
        """Cast the weights, and get ready for rows of `length` tokens in all, `batch` at a time. Ends training."""

    @abstractmethod
    def generate(self, prompts: Prompts, n: int) -> list[list[int]]:
        """Exactly `n` most probable tokens behind each prompt; no token ends a row."""

    def decoded_bytes(self) -> int:
        """Bytes of weights that one pass of decoding reads: all but an embedding that is not the head as well."""
        modules = list(self.model.modules())
        tables = {module.weight.data_ptr() for module in modules if isinstance(module, nn.Embedding)}
        heads = {module.weight.data_ptr() for module in modules if isinstance(module, nn.Linear)}
        tied = self._head_is_embedding() or bool(tables & heads)
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in self.model.state_dict().values()}
        return sum(size for place, size in tensors.items() if tied or place not in tables)

    def _head_is_embedding(self) -> bool:
        """Whether the embedding's table gives the logits without a layer of its own."""
        return False

    def close(self) -> None:
        """Let go of the model."""
        self.model = nn.Identity()

    # ------------------------------------------------------------------------------------------ for peers

    def autocast(self) -> AbstractContextManager[Any]:
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.precision == "bf16")


class PeerTraining:
    """The training step of a library that brings a model and no loop: what its users write."""

    def __init__(self, model: nn.Module, loss: Callable[..., torch.Tensor], autocast: Callable[[], Any]) -> None:
        self.model, self.loss_of, self.autocast = model, loss, autocast
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)

    def step(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> None:
        with self.autocast():
            loss = self.loss_of(tokens_BT, targets_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def cast(model: nn.Module, precision: str) -> nn.Module:
    """The model for decoding: weights in the precision, evaluation mode, no gradients."""
    return model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision]).eval().requires_grad_(False)
