"""One token of each row through a whole model, as one compiled graph.

A step of decoding reads every weight once and computes next to nothing: its floor is the time that the memory takes to
hand the weights over. Uncompiled it lies far above that floor, for two reasons, and each has its remedy here:

- some twenty operations a layer are launched one by one; here the layers and the head are one graph, in which the
  compiler writes norms, rotations and activations into the loops around them, called from C++;
- torch's products and attention prepare for many rows; here, on a CPU and for at most 8 rows, they are operators of
  ours (`sky_core.native`), each one pass over what it reads at the speed of the memory. On a GPU the whole step is a
  CUDA graph: one launch for all of its kernels.

Shapes are fixed: a pass sees the first `end` slots of the cache, `end` a multiple of `SLOTS`, and the mask hides what
lies behind a row. There is a graph for each number of rows, each `end` and each length of a cache; inductor keeps them
on disk.

B rows, V vocabulary; M rows of an input, K and N input and output features; of attention as in `kernels.py`.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from operator import attrgetter
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from sky_core import native
from sky_core.compilation import keep_compiled_code
from sky_core.errors import UserError
from sky_core.model.context import Context

if TYPE_CHECKING:
    from sky_core.model.cache import Cache

log = logging.getLogger(__name__)

LogitsOf = Callable[[Context], torch.Tensor]

NUMBERS = (torch.float32, torch.bfloat16)
"""What the native operators compute with."""

INT8_ROWS = 2
"""Most rows for which `few_rows` beats torch's kernel for int8 (with four it takes 1.1 times as long)."""

SLOTS = 256
"""Slots of the cache that a graph sees grow by this many."""

STORAGES = 64
"""Caches that CUDA graphs are recorded for before all are dropped: a recording holds the addresses of one, for good."""


def _guards_of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which guards stay: those of tensors and of what a step is given. Two thousand more would ask at every step
    whether the model and the modules of Python are still the ones that were compiled: 0.6 ms. What does change of a
    model is in `CompiledStep._parts`."""
    return [
        guard.guard_type == "TENSOR_MATCH" or not ("logits_of" in guard.name or "G[" in guard.name) for guard in guards
    ]


def _options(device: str) -> dict[str, Any]:
    """Inductor's."""
    own = {"cpu": {"cpp_wrapper": True}, "cuda": {"triton.cudagraphs": True}}.get(device, {})
    filters = hasattr(torch.compiler, "keep_tensor_guards_unsafe")  # not in the oldest torch that we run with
    return {**own, "guard_filter_fn": _guards_of_inputs} if filters else own


class CompiledStep:
    """`logits_BV = step(tokens_B, cache)`, which takes the tokens into the cache, as a compiled graph.

    `logits_of(ctx)` is `model`: logits_BV of a context of one token per row. Weights may change. When modules are
    replaced, hooked (adapters) or put into another mode, the next step compiles anew; what else a module is made of
    (numbers, flags) is taken as it is at the first step of each shape. `options` are `torch.compile`'s (default:
    inductor with `_options`). Raises `UserError` for a model that is not one graph.
    """

    def __init__(self, model: nn.Module, logits_of: LogitsOf, **options: Any) -> None:
        keep_compiled_code()
        self._model, self._logits_of, self._options = model, logits_of, options
        self._begin()

    def __call__(self, tokens_B: torch.Tensor, cache: Cache, idle: int = 0) -> torch.Tensor:
        """What comes of the last `idle` rows means nothing: no `end` is chosen for them."""
        cache.check_room(1)
        rows, device = len(tokens_B), tokens_B.device.type
        longest = max(cache.lengths[: rows - idle])
        end = min((longest // SLOTS + 1) * SLOTS, cache.max_length)
        slots_B1 = torch.tensor(cache.lengths, device=tokens_B.device)[:, None]
        few = device == "cpu" and rows <= native.MOST_ROWS and native.load()
        if self._parts() != self._compiled or len(self._storages) > STORAGES:
            self._begin()
        if device == "cuda":
            tensors = cache.tensors()
            self._storages.add(tuple(tensor.data_ptr() for tensor in tensors))
            for tensor in tensors:  # written in place: a CUDA graph writes where it was recorded to write
                torch._dynamo.mark_static_address(tensor)
            torch.compiler.cudagraph_mark_step_begin()
        graph = self._graph(device, rows, end, cache.max_length)
        try:
            logits_BV: torch.Tensor = graph(self._logits_of, tokens_B[:, None], slots_B1, end, cache, few)
        except torch._dynamo.exc.Unsupported as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"this model is not one graph ({reason}): decode without compiling") from error
        cache.advance([1] * rows)
        return logits_BV.clone() if device == "cuda" else logits_BV  # whose memory the next step writes

    def _begin(self) -> None:
        """Forget what was compiled, if anything."""
        self._graphs: dict[tuple[Any, ...], Callable[..., torch.Tensor]] = {}
        self._storages: set[tuple[int, ...]] = set()
        self._modules = list(self._model.modules())
        self._hooks = [hooks for one in self._modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self._children = [one._modules for one in self._modules if one._modules]
        self._compiled = self._parts()

    def _parts(self) -> list[Any]:
        """The modules' modes, hooks and children: what is asked at every step, and so without a loop in Python."""
        children = chain.from_iterable(map(dict.values, self._children))
        return [*map(attrgetter("training"), self._modules), *chain.from_iterable(self._hooks), *children]

    def _graph(self, device: str, rows: int, end: int, max_length: int) -> Callable[..., torch.Tensor]:
        key = (device, rows, end, max_length)
        if key not in self._graphs:
            log.info("compiling a decoding step of %d rows over %d slots", rows, end)
            # torch looks graphs up by code object, and gives up where one has many: each graph has its own.
            own = FunctionType(_step.__code__.replace(), _step.__globals__)
            weakref.finalize(own, torch._dynamo.reset_code, own.__code__).atexit = False
            options = self._options or {"options": _options(device)}
            if "options" in options:  # of which torch takes some out
                options = options | {"options": dict(options["options"])}
            self._graphs[key] = torch.compile(own, dynamic=False, fullgraph=True, **options)
        return self._graphs[key]


def _step(
    logits_of: LogitsOf, tokens_B1: torch.Tensor, slots_B1: torch.Tensor, end: int, cache: Cache, few: bool
) -> torch.Tensor:
    ctx = Context.at_slots(tokens_B1, slots_B1, end, cache)
    with _FewRows() if few else nullcontext():
        return logits_of(ctx)


class _FewRows(TorchFunctionMode):
    """Products and attention of few rows by the operators of `sky_core.native`, where these take them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:  # whose Python torch cannot trace below a mode
            return torch.unflatten(*args, **kwargs)
        y = INSTEAD[func](*args, **kwargs) if func in INSTEAD else None
        return func(*args, **kwargs) if y is None else y


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    rows = math.prod(input.shape[:-1])
    plain = weight.dim() == 2 and weight.is_contiguous() and input.dtype == weight.dtype in NUMBERS
    if not plain or not 1 <= rows <= native.MOST_ROWS:
        return None
    y_MN = torch.ops.sky.few_rows(input.reshape(rows, -1), weight)
    y = y_MN.view(*input.shape[:-1], len(weight))
    return y if bias is None else y + bias


def _int8(x_MK: torch.Tensor, weight_NK: torch.Tensor, scales_N: torch.Tensor) -> torch.Tensor | None:
    return torch.ops.sky.few_rows(x_MK, weight_NK, scales_N) if len(x_MK) <= INT8_ROWS else None


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    if attn_mask is None or dropout_p or is_causal or enable_gqa:
        return None
    numbers = attn_mask.is_floating_point() and query.dtype == key.dtype == value.dtype in NUMBERS
    alike = query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    together = key.stride(-1) == value.stride(-1) == attn_mask.stride(-1) == 1 and attn_mask.shape[-1] == key.shape[-2]
    widths = query.shape[-1] % native.STEP == value.shape[-1] % native.STEP == 0
    if not (numbers and alike and together and widths):
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.sky.few_queries(query, key, value, attn_mask, scale)


INSTEAD: dict[Any, Callable[..., torch.Tensor | None]] = {
    F.linear: _linear,
    torch._weight_int8pack_mm: _int8,
    F.scaled_dot_product_attention: _attention,
}
"""What computes the same as a function of torch and has its parameters; gives None where it does not take them."""
