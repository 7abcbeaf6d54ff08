"""One token of each row through a whole model, as one compiled graph.

A step of decoding reads every weight once and computes next to nothing: its floor is the time that the memory takes to
hand the weights over. Uncompiled it lies far above that floor, for three reasons, and each has its remedy here:

- some twenty operations a layer are launched one by one; here the layers and the head are one graph, in which the
  compiler writes norms, rotations and activations into the loops around them, called from C++;
- torch's products and attention prepare for many rows; here, on a CPU and for at most 8 rows, they are operators of
  ours (`decoding_operators.py`), each one pass over what it reads at the speed of the memory. On a GPU the whole step
  is a CUDA graph: one launch for all of its kernels;
- `torch.compile` asks two thousand questions before each call, whether the model, its modules and Python are still
  those that were compiled, and gathers the graph's inputs attribute by attribute: 1 ms. Here the graph is called with
  the tensors that it had the first time, but for tokens, slots and cache; `CompiledStep._changed` asks what matters.

Shapes are fixed: a pass sees the first `end` slots of the cache, `end` a multiple of `SLOTS`, and the mask hides what
lies behind a row. There is a graph for each number of rows, each `end` and each length of a cache; inductor keeps them
on disk.

B rows, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from operator import attrgetter
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sky_core import native
from sky_core.compilation import keep_compiled_code
from sky_core.errors import UserError
from sky_core.model.context import Context
from sky_core.model.decoding_operators import FewRows, Join

if TYPE_CHECKING:
    from sky_core.model.cache import Cache

log = logging.getLogger(__name__)

LogitsOf = Callable[[Context], torch.Tensor]

SLOTS = 256
"""Slots of the cache that a graph sees grow by this many."""

STORAGES = 64
"""Caches that CUDA graphs are recorded for before all are dropped: a recording holds the addresses of one, for good."""


class CompiledStep:
    """`logits_BV = step(tokens_B, cache)`, which takes the tokens into the cache, as a compiled graph.

    `logits_of(ctx)` is `model`: logits_BV of a context of one token per row. Weights may change. When modules or
    parameters of it or of its adapters are replaced, hooked, cast or put into another mode, the next step compiles
    anew; what else a module is made of (numbers, flags, other views of the same storage) is taken as it is at the first
    step of each shape. `backend` is one of torch's (a name or a function) and `options` are its (default: inductor with
    ours). Raises `UserError` for a model that is not one graph.
    """

    def __init__(
        self,
        model: nn.Module,
        logits_of: LogitsOf,
        backend: str | Callable[..., Any] = "inductor",
        options: dict[str, Any] | None = None,
    ) -> None:
        keep_compiled_code()
        self._model, self._logits_of, self._backend, self._options = model, logits_of, backend, options
        self._compiled: list[Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledStep:
        """That of a copy of the model, with nothing compiled yet."""
        model, logits_of = copy.deepcopy((self._model, self._logits_of), memo)
        return CompiledStep(model, logits_of, self._backend, self._options)

    def __call__(self, tokens_B: torch.Tensor, cache: Cache, idle: int = 0) -> torch.Tensor:
        """What comes of the last `idle` rows means nothing: no `end` is chosen for them."""
        rows, device = len(tokens_B), tokens_B.device.type
        if rows != len(cache.lengths):
            raise ValueError(f"there are {rows} tokens and the cache has {len(cache.lengths)} rows")
        cache.check_room(1)
        longest = max(cache.lengths[: rows - idle])
        end = min(self.room_for(longest + 1), cache.max_length)
        tokens_B1 = tokens_B.to(torch.int64).contiguous()[:, None]
        slots_B1 = torch.tensor(cache.lengths, device=tokens_B.device)[:, None]
        tensors = cache.tensors()
        if self._compiled is None or self._changed() or len(self._storages) > STORAGES:
            self._begin()
        if device == "cuda":
            self._storages.add(tuple(tensor.data_ptr() for tensor in tensors))
            for tensor in tensors:  # written in place: a CUDA graph writes where it was recorded to write
                torch._dynamo.mark_static_address(tensor)
            torch.compiler.cudagraph_mark_step_begin()
        precision = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), precision)
        key = (device, rows, end, *modes, *(kind for x in tensors for kind in (x.dtype, x.shape, x.stride())))
        if key not in self._graphs:
            log.info("compiling a decoding step of %d rows over %d slots", rows, end)
            self._graphs[key] = _Graph(self._logits_of, end, self._backend, self._options)
        logits_BV = self._graphs[key](tokens_B1, slots_B1, cache, tensors)
        cache.advance([1] * rows)
        return logits_BV.clone() if device == "cuda" else logits_BV  # whose memory the next step writes

    @staticmethod
    def room_for(length: int) -> int:
        """Slots of a cache whose graphs serve many lengths."""
        return -(-length // SLOTS) * SLOTS

    def _begin(self) -> None:
        """Forget what was compiled, if anything."""
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._storages: set[tuple[int, ...]] = set()
        parts = [self._model, *(attached.module for attached in getattr(self._model, "adapters", ()))]
        self._modules = [one for part in parts for one in part.modules()]
        self._hooks = [hooks for one in self._modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self._tables = [
            table for one in self._modules for table in (one._modules, one._parameters, one._buffers) if table
        ]
        self._tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        self._compiled, self._kinds, self._pointers = (
            self._parts(),
            self._kinds_of_tensors(),
            self._pointers_of_tensors(),
        )

    def _changed(self) -> bool:
        """Whether the graphs are of a model that was another: asked at every step, and so without loops in Python."""
        if self._parts() != self._compiled:
            return True
        pointers = self._pointers_of_tensors()
        if pointers != self._pointers:  # other storage: of the same kind?
            if self._kinds_of_tensors() != self._kinds:
                return True
            self._pointers = pointers
        return False

    def _parts(self) -> list[Any]:
        """The modules' modes, hooks, children and tensors."""
        return [
            *map(attrgetter("training"), self._modules),
            *map(tuple, filter(None, self._hooks)),
            *map(id, chain.from_iterable(map(dict.values, self._tables))),
        ]

    def _pointers_of_tensors(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._tensors))

    def _kinds_of_tensors(self) -> list[Any]:
        return [(x.dtype, x.device, x.shape, x.stride()) for x in self._tensors]


class _Graph:
    """A step compiled for one shape, at its first call."""

    def __init__(
        self, logits_of: LogitsOf, end: int, backend: str | Callable[..., Any], options: dict[str, Any] | None
    ) -> None:
        self._logits_of, self._end, self._backend = logits_of, end, _Backend(backend, options)
        # torch looks graphs up by code object, and gives up where one has many: each graph has its own.
        own = FunctionType(_step.__code__.replace(), _step.__globals__)
        weakref.finalize(own, torch._dynamo.reset_code, own.__code__).atexit = False
        self._step = torch.compile(own, dynamic=False, fullgraph=True, backend=self._backend)
        self._run: Callable[..., Any] | None = None
        """What the backend made, where it can be called directly."""
        self._inputs: list[torch.Tensor | None] = []
        """Its inputs, None for those that are of one step."""
        self._places: list[tuple[int, int]] = []
        """(index among tokens, slots and the cache's tensors, index among the inputs)."""

    def __call__(
        self, tokens_B1: torch.Tensor, slots_B1: torch.Tensor, cache: Cache, tensors: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """logits_BV; `tensors` are those of the cache."""
        given = (tokens_B1, slots_B1, *tensors)
        if self._run is not None:
            now = self._inputs.copy()
            for i, place in self._places:
                now[place] = given[i]
            logits_BV: torch.Tensor = self._run(*now)[0]
            return logits_BV
        few = tokens_B1.device.type == "cpu" and len(tokens_B1) <= native.MOST_ROWS and native.load()
        try:
            logits_BV = self._step(self._logits_of, tokens_B1, slots_B1, self._end, cache, few)
        except torch._dynamo.exc.Unsupported as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"this model is not one graph ({reason}): decode without compiling") from error
        made, inputs, outputs = self._backend.take()
        # A state that a step replaces by another (recurrent memories) is set by torch, around the graph.
        in_place = all(now is then for now, then in zip(cache.tensors(), tensors, strict=True))
        if in_place and logits_BV is outputs[0]:
            index = {id(tensor): i for i, tensor in enumerate(given)}
            self._places = [(index[id(x)], place) for place, x in enumerate(inputs) if id(x) in index]
            self._inputs = [None if id(x) in index else x for x in inputs]
            self._run = made
        return logits_BV


class _Backend:
    """A backend, seen at work. It knows nothing of the model, because torch keeps it for as long as the code is there,
    which is as long as a `_Graph` is."""

    def __init__(self, backend: str | Callable[..., Any], options: dict[str, Any] | None) -> None:
        self._backend, self._options = backend, options
        self._made: Callable[..., Any] | None = None
        self._inputs: Sequence[Any] = ()
        self._outputs: Sequence[Any] = ()

    def __call__(self, graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., Any]:
        inductor = self._backend == "inductor"
        options = _options(examples[0].device.type) if inductor and self._options is None else self._options
        given = {"config_patches" if inductor else "options": options} if options else {}
        made = self._made = torch._dynamo.lookup_backend(self._backend)(graph, examples, **given)

        def run(*inputs: Any) -> Any:
            self._inputs, self._outputs = inputs, made(*inputs)
            return self._outputs

        return run

    def take(self) -> tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]:
        """What was made, the inputs and the outputs of its last call, which are kept no longer."""
        assert self._made is not None
        inputs, outputs, self._inputs, self._outputs = self._inputs, self._outputs, (), ()
        return self._made, inputs, outputs


def _options(device: str) -> dict[str, Any]:
    """Inductor's."""
    if device == "cuda":
        return {"triton.cudagraphs": True}
    if device != "cpu":
        return {}
    return {
        "cpp_wrapper": True,
        "post_grad_custom_pre_pass": Join(),
        "cpp.min_chunk_size": 2**12,  # numbers that are worth a thread
        "size_asserts": False,  # 0.2 ms; `CompiledStep` has asked
    }


def _step(
    logits_of: LogitsOf, tokens_B1: torch.Tensor, slots_B1: torch.Tensor, end: int, cache: Cache, few: bool
) -> torch.Tensor:
    ctx = Context.at_slots(tokens_B1, slots_B1, end, cache)
    with FewRows() if few else nullcontext():
        return logits_of(ctx)
