"""One token of each row through a whole model, as one compiled graph.

A step of decoding reads every weight once and computes next to nothing: its floor is the time that the memory takes to
hand the weights over. Uncompiled it lies far above that floor, for two reasons, and each has its remedy here:

- some twenty operations a layer are launched one by one; here the layers and the head are one graph, in which the
  compiler writes norms, rotations and activations into the loops around them, called from C++;
- torch's products and attention prepare for many rows; here, on a CPU and for at most 8 rows, they are operators of
  ours (`sky_core.native`), each one pass over what it reads at the speed of the memory. On a GPU the whole step is a
  CUDA graph: one launch for all of its kernels.

Shapes are fixed: a pass sees the first `end` slots of the cache, `end` a multiple of `SLOTS`, and the mask hides what
lies behind a row. There is a graph for each number of rows and each `end`; inductor keeps them on disk.

B rows, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sky_core import native
from sky_core.compilation import keep_compiled_code
from sky_core.model.context import Context

if TYPE_CHECKING:
    from sky_core.model.cache import Cache

log = logging.getLogger(__name__)

NUMBERS = (torch.float32, torch.bfloat16)
"""What the native operators compute with."""

INT8_ROWS = 2
"""Most rows for which `few_rows` beats torch's kernel for int8 (with four it takes 1.1 times as long)."""

SLOTS = 256
"""Slots of the cache that a graph sees grow by this many."""


def _guards_of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which guards stay: those of tensors and of what a step is given. Two thousand more would ask at every step
    whether the model's modules are still the ones that were compiled: 0.6 ms."""
    return [guard.guard_type == "TENSOR_MATCH" or not guard.name.startswith("self.") for guard in guards]


OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"cpp_wrapper": True, "guard_filter_fn": _guards_of_inputs},
    "cuda": {"triton.cudagraphs": True, "guard_filter_fn": _guards_of_inputs},
}
"""Inductor's, by device."""


class CompiledStep:
    """`logits_BV = step(tokens_B, cache)`, which takes the tokens into the cache, as a compiled graph.

    `logits_of(ctx)` is the model: logits_BV of a context of one token per row. It is compiled as it is at the first
    step of each shape: what is hooked into its modules later is not seen, weights may change. `options` are
    `torch.compile`'s (default: inductor with `OPTIONS` of `device`).
    """

    def __init__(self, logits_of: Callable[[Context], torch.Tensor], device: torch.device, **options: Any) -> None:
        keep_compiled_code()
        self._logits_of = logits_of
        self._on_cuda = device.type == "cuda"
        self._graph = torch.compile(self._step, dynamic=False, **(options or {"options": OPTIONS.get(device.type)}))
        self._seen: set[tuple[int, int]] = set()

    def __call__(self, tokens_B: torch.Tensor, cache: Cache) -> torch.Tensor:
        cache.check_room(1)
        longest = max(cache.lengths)
        end = min((longest // SLOTS + 1) * SLOTS, cache.max_length)
        if (len(tokens_B), end) not in self._seen:
            self._seen.add((len(tokens_B), end))
            log.info("compiling a decoding step of %d rows over %d slots", len(tokens_B), end)
        slots_B1 = torch.tensor(cache.lengths, device=tokens_B.device)[:, None]
        few = tokens_B.device.type == "cpu" and len(tokens_B) <= native.MOST_ROWS and native.load()
        if self._on_cuda:
            for tensor in cache.tensors():  # written in place: a CUDA graph writes where it was recorded to write
                torch._dynamo.mark_static_address(tensor)
            torch.compiler.cudagraph_mark_step_begin()
        logits_BV: torch.Tensor = self._graph(tokens_B[:, None], slots_B1, end, cache, few)
        cache.advance([1] * len(tokens_B))
        return logits_BV.clone() if self._on_cuda else logits_BV  # whose memory the next step writes

    def _step(self, tokens_B1: torch.Tensor, slots_B1: torch.Tensor, end: int, cache: Cache, few: bool) -> torch.Tensor:
        ctx = Context.at_slots(tokens_B1, slots_B1, end, cache)
        with _FewRows() if few else nullcontext():
            return self._logits_of(ctx)


class _FewRows(TorchFunctionMode):
    """Products and attention of few rows by the operators of `sky_core.native`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and args[0].dtype == args[1].dtype in NUMBERS:
            x, weight_NK, *bias = args
            y_MN = torch.ops.sky.few_rows(x.flatten(0, -2), weight_NK)
            y = y_MN.view(*x.shape[:-1], len(weight_NK))
            return y + bias[0] if bias and bias[0] is not None else y
        if func is torch._weight_int8pack_mm and len(args[0]) <= INT8_ROWS:
            return torch.ops.sky.few_rows(*args)
        if func is F.scaled_dot_product_attention and _reads_a_cache(*args, **kwargs):
            return torch.ops.sky.few_queries(*args[:4], kwargs["scale"])
        return func(*args, **kwargs)


def _reads_a_cache(
    q_BGRE: torch.Tensor,
    k_BGSE: torch.Tensor,
    v_BGSF: torch.Tensor,
    bias: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    *,
    enable_gqa: bool = False,
    **_: Any,
) -> bool:
    """Whether this is attention of new tokens that `few_queries` takes."""
    widths = q_BGRE.shape[3] % native.STEP == 0 and v_BGSF.shape[3] % native.STEP == 0
    plain = bias is not None and dropout == 0 and not is_causal and not enable_gqa
    return widths and plain and q_BGRE.dtype == k_BGSE.dtype == v_BGSF.dtype and q_BGRE.dtype in NUMBERS
