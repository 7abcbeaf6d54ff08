"""The contract of a language model: hidden states, logits and a loss that never holds all logits are separate.

B batch, T time (tokens), D model width, V vocabulary, H heads, S keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sky_core.errors import UserError
from sky_core.model.cache import Cache

if TYPE_CHECKING:
    from sky_core.model.adapter import Attached
    from sky_core.model.context import Context
    from sky_core.model.recompute import Recompute


class LanguageModel(nn.Module, ABC):
    """Predicts the next token. Base state-dict keys never change, whatever is attached from outside.

    The taps of adapters (`sky_core.model.adapter`) are its linear layers, `context_hooks`, and the parts called
    `embed_tokens`, `layers` and `norm`.
    """

    vocab_size: int
    max_length: int
    n_layer: int
    n_mtp: int = 0
    """Modules that predict the token after the next and so on (`mtp_hidden`)."""

    def __init__(self) -> None:
        super().__init__()
        self.activation_checkpointing: Recompute = "none"
        """What layers compute again in the backward pass instead of keeping it (`sky_core.model.recompute`)."""
        self.context_hooks: list[Callable[[Context], None]] = []
        """Called with the fresh context of every pass, before any layer reads it (the tap of key/value prefixes)."""
        self.adapters: list[Attached] = []
        """What is attached to this model, oldest first."""

    @abstractmethod
    def hidden(
        self,
        tokens_BT: torch.Tensor,
        *,
        positions_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        valid_BT: torch.Tensor | None = None,
        prefix_B: torch.Tensor | None = None,
        cache: Cache | None = None,
        collect: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Hidden states h_BTD after the final norm: what the head, embeddings and adapters read.

        `positions_BT` (default 0..T-1, or after what the cache holds) feed the position encoding; `documents_BT`
        keeps attention inside documents; `valid_BT` marks real tokens of right-padded rows; the first `prefix_B`
        tokens of a row see each other (prefix LM; with a cache they come in its first pass).

        `cache` holds earlier tokens and takes these in: its `lengths` advance by the number of valid tokens of each
        row (T where `valid_BT` is None). What lies behind a row's valid tokens is overwritten by its next ones.

        With `collect`, the pass puts in `losses` (auxiliary losses by name) and, for each of these keys that is
        present, `hidden_states` (list of n_layer + 1 h_BTD: embeddings, then after each block) and `attention`
        (layer -> map a_BHTS, for layers that compute one).

        Raises `ValueError` when the tokens do not fit `max_length` or the cache, or the options contradict each other.
        """

    def step(self, tokens_B: torch.Tensor, cache: Cache, *, idle: int = 0) -> torch.Tensor:
        """logits_BV of what follows one more token of each row, which the cache takes in.

        The last `idle` rows only fill up a number of rows that is best (`rows_of_step`): nobody reads their logits.
        """
        return self.logits(self.hidden(tokens_B[:, None], cache=cache))[:, 0]

    def rows_of_step(self, rows: int) -> int:
        """How many rows `step` is best given when `rows` have a token to take in, the rest being idle ones."""
        return rows

    def compile_decoding(self, **options: Any) -> None:
        """Compile `step`: seconds to a minute at its first use, a fraction of the time of each token from then on.

        `options` are `backend` and its `options` as `torch.compile` takes them (inductor's by their own names). Raises
        `UserError` where a model cannot.
        """
        raise UserError(f"{type(self).__name__} has no compiled decoding")

    @abstractmethod
    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """logits_BTV of hidden states."""

    @abstractmethod
    def nll(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Summed negative log-likelihood (nats, a scalar) of the targets, IGNORE left out.

        Computed in chunks: the full logits_BTV are never held.
        """

    def forward(self, tokens_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        """logits_BTV; options as for `hidden`."""
        return self.logits(self.hidden(tokens_BT, **options))

    @abstractmethod
    def new_cache(self, batch: int, max_length: int | None = None) -> Cache:
        """Empty state for incremental decoding of up to `max_length` (default: the model's) tokens per row."""

    def mtp_hidden(
        self,
        depth: int,
        hidden_BTD: torch.Tensor,
        tokens_BT: torch.Tensor,
        *,
        positions_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        valid_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
        collect: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Hidden states for the head that predict the token `depth + 2` ahead of each position (depth 0..n_mtp - 1).

        `hidden_BTD` is what `hidden` (for depth 0) or depth - 1 gave at these positions, `tokens_BT` the tokens
        depth + 1 further on. `cache` comes from `new_mtp_cache(depth, ...)`; other options as for `hidden`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no modules of multi-token prediction")

    def new_mtp_cache(self, depth: int, batch: int, max_length: int | None = None) -> Cache:
        """Empty state for `mtp_hidden` at that depth."""
        raise NotImplementedError(f"{type(self).__name__} has no modules of multi-token prediction")

    def lr_scale(self) -> dict[str, float]:
        """Parameter name -> factor of Adam's learning rate, where it is not 1 (muP)."""
        return {}

    def use_operators(self) -> None:
        """Take the operators of `sky_core.native` where they serve. A model may have no use for them."""

    @abstractmethod
    def compile_layers(self, **options: Any) -> None:
        """Compile each layer in place with `torch.compile(**options)`; names of parameters stay as they are.

        Each kind of layer is compiled once to be trained and once to be evaluated, at the first shape of an evaluation;
        evaluations of another shape and passes with a cache run uncompiled.
        """

    @abstractmethod
    def n_parameters(self) -> dict[str, int]:
        """{"total", "embedding", "body"}: distinct parameters; embeddings are tables indexed by token or position,
        an untied head counts as embedding."""

    @abstractmethod
    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs per token: 6 per matrix parameter used, plus attention's share at this length."""
