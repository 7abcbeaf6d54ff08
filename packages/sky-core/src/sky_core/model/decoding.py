"""One token of each row through a whole model, as one compiled graph.

A step of decoding reads every weight once and computes next to nothing: its floor is the time that the memory takes to
hand the weights over. Uncompiled it lies far above that floor, for two reasons, and each has its remedy here:

- some twenty operations a layer are launched one by one; here the layers and the head are one graph, in which the
  compiler writes norms, rotations and activations into the loops around them;
- the products of a single row, y_n = Σ_k W_nk x_k, take torch's matrix product, which prepares for many rows; here
  they are written as multiply and sum (in fp32), which the compiler makes one pass over W at the speed of the memory.
  With two rows or more the matrix product is the better one.

Shapes are fixed: a pass sees the first `end` slots of the cache, `end` a multiple of `SLOTS`, and the mask hides what
lies behind a row. There is a graph for each number of rows and each `end`; inductor keeps them on disk.

B rows, K inputs and N outputs of a matrix, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sky_core.model.context import Context

if TYPE_CHECKING:
    from sky_core.model.cache import Cache

log = logging.getLogger(__name__)

SLOTS = 256
"""Slots of the cache that a graph sees grow by this many."""


class CompiledStep:
    """`logits_BV = step(tokens_B, cache)`, which takes the tokens into the cache, as a compiled graph.

    `logits_of(ctx)` is the model: logits_BV of a context of one token per row. Other options are `torch.compile`'s.
    """

    def __init__(self, logits_of: Callable[[Context], torch.Tensor], **options: Any) -> None:
        self._logits_of = logits_of
        self._graph = torch.compile(self._step, dynamic=False, **options)
        self._seen: set[tuple[int, int]] = set()

    def __call__(self, tokens_B: torch.Tensor, cache: Cache) -> torch.Tensor:
        cache.check_room(1)
        longest = max(cache.lengths)
        end = min((longest // SLOTS + 1) * SLOTS, cache.max_length)
        if (len(tokens_B), end) not in self._seen:
            self._seen.add((len(tokens_B), end))
            log.info("compiling a decoding step of %d rows over %d slots", len(tokens_B), end)
        slots_B1 = torch.tensor(cache.lengths, device=tokens_B.device)[:, None]
        logits_BV: torch.Tensor = self._graph(tokens_B[:, None], slots_B1, end, cache)
        cache.advance([1] * len(tokens_B))
        return logits_BV

    def _step(self, tokens_B1: torch.Tensor, slots_B1: torch.Tensor, end: int, cache: Cache) -> torch.Tensor:
        ctx = Context.at_slots(tokens_B1, slots_B1, end, cache)
        with _MatrixTimesVector() if len(tokens_B1) == 1 else nullcontext():
            return self._logits_of(ctx)


class _MatrixTimesVector(TorchFunctionMode):
    """Linear maps of a single row on a CPU become multiply and sum."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.linear or args[0].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        x, weight_NK, *bias = args
        y = (x.float()[..., None, :] * weight_NK.float()).sum(-1).to(x.dtype)
        return y + bias[0] if bias and bias[0] is not None else y
