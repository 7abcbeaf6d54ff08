"""Activation checkpointing: keep less of the forward pass, and compute it again where the backward pass needs it.

    none       everything that a gradient reads is kept
    selective  results of matrix products and of fused attention are kept; norms, activations, rotations, casts and the
               score matrices of unfused attention are computed again
    block      only what enters a layer is kept: one more forward pass, a third more FLOPs (Chen et al. 2016,
               arXiv:1604.06174)

`selective` is after Korthikanti et al. 2022 (arXiv:2205.05198), section 5: compute again what holds much memory and
takes few FLOPs. Where we differ: the paper computes attention's softmax(QKᵀ)V again and keeps the rest of the layer.
Fused attention holds no scores in the first place, so ours keeps its result, and turns on the element-wise operations
instead, which hold what is left: under autocast every norm, activation and rotation keeps fp32 and bf16 copies.
Random operations that return a new tensor (dropout on GPUs) are kept too: recomputed behind attention that is not, they
would draw other numbers. Gradients are those of `none`, bit for bit on a CPU.

Layers that are compiled get the same from the compiler (`selective_in_compiled`), which chooses by the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

if TYPE_CHECKING:
    from sky_core.model.context import Context

Recompute = Literal["none", "selective", "block"]

KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_mm",
        "aten::_grouped_mm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "sky::flash",
        "sky::grouped",
    }
)
"""Operations whose results `selective` keeps. Not `bmm`: in a layer it makes the scores of unfused attention."""


def recomputed(
    policy: Recompute, module: nn.Module, ctx: Context, *inputs: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`module(*inputs, ctx)` under a policy other than `none`, and the losses that it would have added to `ctx`: the
    second run must not add them a second time."""
    contexts: Callable[[], Any] = noop_context_fn
    if policy == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _choice)

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        own = replace(ctx, losses={})
        with _autocast_without_cache(inputs[0].device.type):
            return module(*inputs, own), own.losses

    return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def selective_in_compiled() -> Iterator[None]:
    """Inside, the compiler keeps results of the operations in KEPT and of reductions only."""
    import torch._functorch.config
    from torch._functorch import partitioners

    known = partitioners.get_default_op_list

    def with_kept() -> Any:
        """Its own list lacks attention on CPUs and by cuDNN, and what is registered outside of torch."""
        types = known()
        spaces = ((getattr(torch.ops, space), name) for space, name in (one.split("::") for one in KEPT))
        kept = {getattr(space, name) for space, name in spaces if hasattr(space, name)}
        return replace(types, compute_intensive_ops=types.compute_intensive_ops | kept)

    with (
        torch._functorch.config.patch(aggressive_recomputation=True),
        patch.object(partitioners, "get_default_op_list", with_kept),
    ):
        yield


def _choice(ctx: Any, operation: torch._ops.OpOverload, *inputs: Any, **options: Any) -> CheckpointPolicy:
    del ctx, inputs, options
    random = torch.Tag.nondeterministic_seeded in operation.tags and not operation._schema.is_mutable
    keep = random or operation._schema.name in KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _autocast_without_cache(device_type: str) -> AbstractContextManager[Any]:
    """The autocast that is on, casting weights each time: the second run must make every operation of the first, and
    finds no casts that an earlier pass has left."""
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
