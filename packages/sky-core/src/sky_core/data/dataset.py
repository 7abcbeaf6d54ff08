"""Batches and the contract of a dataset.

B batch (sequences), T time (tokens).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sky_core.tokenizer.base import Tokenizer

IGNORE = -100
"""Target that carries no loss."""


@dataclass(frozen=True)
class Batch:
    """Sequences for one forward pass.

    `targets_BT[b, t]` is the token that follows `tokens_BT[b, t]`, or IGNORE. `documents_BT` numbers the documents of
    a packed row (None: attention crosses document borders); `positions_BT` restart with each document when it is set.
    `extra` holds what an objective of a plugin needs (rewards, teacher signals, masks), tensors with leading B.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    documents_BT: torch.Tensor | None = None
    positions_BT: torch.Tensor | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    _n_targets: int | None = field(default=None, init=False, repr=False, compare=False)

    def n_targets(self) -> int:
        """Number of tokens that carry loss."""
        return int((self.targets_BT != IGNORE).sum()) if self._n_targets is None else self._n_targets

    def to(self, device: torch.device | str) -> Batch:
        """This batch on `device`, which is not waited for: tokens are counted on the way there, not behind it."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        object.__setattr__(moved, "_n_targets", self.n_targets())
        return moved

    def pinned(self) -> Batch:
        """A copy in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)

    def rows(self, start: int, stop: int) -> Batch:
        """The sequences start..stop-1."""
        return self._map(lambda tensor: tensor[start:stop])

    def _map(self, function: Any) -> Batch:
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, torch.Tensor):
                moved[item.name] = function(value)
        moved["extra"] = {name: function(tensor) for name, tensor in self.extra.items()}
        return replace(self, **moved)


class Dataset(ABC):
    """An endless, deterministic stream of training sequences, and a validation split read once in order.

    The stream is random access: sequence i is the same whatever was read before, so the whole state of a reader is
    the number of sequences consumed. Epoch e holds the sequences e * len .. (e + 1) * len - 1, each exactly once.
    """

    tokenizer: Tokenizer
    sequence_length: int

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the data or its order changes; compared when a run is resumed."""

    @abstractmethod
    def __len__(self) -> int:
        """Training sequences in one epoch."""

    @abstractmethod
    def batch(self, start: int, count: int) -> Batch:
        """Sequences start .. start + count - 1 of the training stream, on the CPU."""

    @abstractmethod
    def validation(self, batch_size: int) -> Iterator[Batch]:
        """The whole validation split: every target exactly once, rows padded with IGNORE where they end early.

        Raises `DataError` when there is no validation split.
        """

    def domains(self) -> dict[str, Dataset]:
        """The parts that evaluations tell apart, by name; together, in this order, their validation splits are the
        whole one. Nothing where there is only one kind of text."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Facts for `sky show` and the log (tokens, documents, bytes per split)."""
        return {}
