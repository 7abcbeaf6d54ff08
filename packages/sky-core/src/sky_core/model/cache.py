"""State carried between forward passes: explicit, one object per layer, passed in and out.

B rows of a batch, H key/value heads, S slots (cache positions), E width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from sky_core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sky_core.model.context import Context


class LayerCache(ABC):
    """The state of one layer: a flat collection of tensors, each with the batch as its first dimension.

    What else it holds (numbers, flags) must not change: compiled decoding takes that as it is at its first step.
    """

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The state by name."""

    @abstractmethod
    def replace(self, tensors: dict[str, torch.Tensor]) -> LayerCache:
        """The same kind of state holding `tensors`."""

    @abstractmethod
    def reset(self, rows_B: torch.Tensor) -> None:
        """Forget the rows where the boolean `rows_B` is true, in place."""

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget, in place, what row b holds behind its first `lengths[b]` tokens.

        Where each token has a place of its own and the mask hides those behind the end, there is nothing to do. A state
        that folds tokens together or drops old ones raises `UserError`, whatever the lengths; so does this default.
        """
        raise UserError(
            f"{type(self).__name__} cannot take tokens back, which checking the tokens of a draft needs; "
            "generate without a draft"
        )

    def detach(self) -> LayerCache:
        """A copy that gradients do not enter: writing to it leaves what an earlier segment's backward needs alone."""
        return self.replace({name: tensor.detach().clone() for name, tensor in self.tensors().items()})

    def select(self, rows: torch.Tensor) -> LayerCache:
        """State whose row i is row rows[i] of this one (reorder, repeat or drop rows)."""
        return self.replace({name: tensor[rows] for name, tensor in self.tensors().items()})


class KVCache(LayerCache):
    """Keys and values of every token so far, preallocated; the token of position p lies in slot p.

    Slots past a row's length may hold anything: the mask hides them and the next token overwrites them. That is what
    lets rows of different lengths share one cache: prompts are padded on the right.
    """

    def __init__(self, k_BHSE: torch.Tensor, v_BHSE: torch.Tensor) -> None:
        self.k_BHSE = k_BHSE
        self.v_BHSE = v_BHSE

    @classmethod
    def empty(
        cls, batch: int, heads: int, slots: int, k_dim: int, v_dim: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        return cls(
            torch.zeros(batch, heads, slots, k_dim, device=device, dtype=dtype),
            torch.zeros(batch, heads, slots, v_dim, device=device, dtype=dtype),
        )

    def update(self, k_BHTE: torch.Tensor, v_BHTE: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values to their slots; returns all keys and values up to the longest row's end."""
        length = k_BHTE.shape[2]
        if ctx.aligned:
            span = slice(ctx.end - length, ctx.end)
            self.k_BHSE[:, :, span] = k_BHTE
            self.v_BHSE[:, :, span] = v_BHTE
        else:
            rows_B1 = torch.arange(len(k_BHTE), device=k_BHTE.device)[:, None]
            self.k_BHSE[rows_B1, :, ctx.slots_BT] = k_BHTE.transpose(1, 2).to(self.k_BHSE.dtype)
            self.v_BHSE[rows_B1, :, ctx.slots_BT] = v_BHTE.transpose(1, 2).to(self.v_BHSE.dtype)
        return self.k_BHSE[:, :, : ctx.end], self.v_BHSE[:, :, : ctx.end]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"k": self.k_BHSE, "v": self.v_BHSE}

    def replace(self, tensors: dict[str, torch.Tensor]) -> KVCache:
        return KVCache(tensors["k"], tensors["v"])

    def reset(self, rows_B: torch.Tensor) -> None:
        """Nothing to do: a row of length 0 sees none of its slots."""

    def rewind(self, lengths: Sequence[int]) -> None:
        """Nothing to do: a row sees none of the slots behind its length, and its next tokens overwrite them."""


class Cache:
    """The state of a whole model while it decodes: how many tokens each row holds, and one state per layer.

    `lengths` lives on the host (decoding decides on it at every step). `layers[i]` is the attention state of layer i,
    `memories[i]` that of its memory, None where it has none.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_length: int,
        layers: list[LayerCache | None],
        memories: list[LayerCache | None],
    ) -> None:
        self.lengths = list(lengths)
        self.max_length = max_length
        self.layers = layers
        self.memories = memories

    def check_room(self, count: int) -> None:
        """Raise `ValueError` unless `count` more tokens of every row fit."""
        longest = max(self.lengths)
        if longest + count > self.max_length:
            raise ValueError(
                f"the cache has room for {self.max_length} tokens per row: row {self.lengths.index(longest)} holds"
                f" {longest} and {count} more do not fit; drop full rows (cache.select) or make a longer cache"
            )

    def advance(self, counts: Sequence[int]) -> None:
        """Row b has taken in counts[b] more tokens."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def rollback(self, lengths: Sequence[int]) -> None:
        """Go back to when row b held `lengths[b]` tokens, at most as many as now.

        Raises `UserError` when the state of a layer cannot go back.
        """
        if any(then > now for then, now in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"rows of {self.lengths} tokens cannot go back to {list(lengths)}: some are longer")
        for state in self.states:
            state.rewind(lengths)
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> Cache:
        index = torch.tensor(rows)
        pick = [[state and state.select(index) for state in states] for states in (self.layers, self.memories)]
        return Cache([self.lengths[row] for row in rows], self.max_length, *pick)

    def join(self, other: Cache) -> Cache:
        """One cache with the rows of this one, then those of `other`; one model made both, for as many tokens."""
        states: list[list[LayerCache | None]] = [
            [
                a and b and a.replace({name: torch.cat([x, b.tensors()[name]]) for name, x in a.tensors().items()})
                for a, b in zip(mine, theirs, strict=True)
            ]
            for mine, theirs in ((self.layers, other.layers), (self.memories, other.memories))
        ]
        return Cache([*self.lengths, *other.lengths], self.max_length, *states)

    def reset(self, rows: Sequence[int]) -> None:
        """Empty the given rows."""
        rows_B = torch.zeros(len(self.lengths), dtype=torch.bool)
        rows_B[list(rows)] = True
        for state in self.states:
            state.reset(rows_B)
        self.lengths = [0 if drop else length for length, drop in zip(self.lengths, rows_B.tolist(), strict=True)]

    @property
    def states(self) -> list[LayerCache]:
        """Those of the layers, then those of the memories."""
        return [state for state in [*self.layers, *self.memories] if state is not None]

    def tensors(self) -> list[torch.Tensor]:
        """Those of all states."""
        return [tensor for state in self.states for tensor in state.tensors().values()]

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())
