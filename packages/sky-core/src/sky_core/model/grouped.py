"""Products of groups of rows, each group with a matrix of its own: what a mixture of experts computes.

    y[n] = x[n] @ w[e]    for offsets[e - 1] <= n < offsets[e]: rows in the order of their groups; groups may be empty

Two ways, equal up to the order of sums: torch's `grouped_mm` (one kernel for all groups), and where it is not for the
operands (bfloat16 on CPUs, float64, rows that are no multiple of 16 bytes, an older torch) one batched product over
groups padded to about the longest. Both are one operator to `torch.compile`, whose own idea of `grouped_mm` is bfloat16
alone.

N rows, K and M widths, E groups, C rows that groups are padded to.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

KINDS = {"torch.float32 on cpu"} | {f"torch.{dtype} on cuda" for dtype in ("float32", "bfloat16", "float16")}
"""Where `grouped_mm` is used. Not in bfloat16 on CPUs: there oneDNN compiles each length of a group anew and keeps it,
gigabytes after a hundred steps, for no gain in speed."""
ALIGNMENT = 16
"""Bytes that the length of a row must be a multiple of."""


def grouped_linear(x_NK: torch.Tensor, weight_EMK: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """y_NM: row n of x times the transposed matrix of its group, as `nn.functional.linear` does; differentiable.

    `offsets_E` holds the end of each group (int32, the last one N). Follows autocast.
    """
    kind = x_NK.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_NK.dtype
    return _grouped(x_NK.to(dtype), weight_EMK.to(dtype).mT, offsets_E)


@torch.library.custom_op("sky::grouped", mutates_args=(), schema="(Tensor x, Tensor w, Tensor offsets) -> Tensor")
def _grouped(x_NK: torch.Tensor, w_EKM: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    if _fits(x_NK, *w_EKM.shape[1:]):
        return F.grouped_mm(x_NK.contiguous(), w_EKM, offs=offsets_E)
    e_N, c_N, C = _places(offsets_E)
    return torch.bmm(_padded(x_NK, e_N, c_N, len(w_EKM), C), w_EKM)[e_N, c_N]


@torch.library.custom_op("sky::grouped_outer", mutates_args=(), schema="(Tensor x, Tensor y, Tensor offsets) -> Tensor")
def _grouped_outer(x_NK: torch.Tensor, y_NM: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """(E, K, M): the sum of x[n] y[n]ᵀ over the rows of each group."""
    if _fits(x_NK, x_NK.shape[1], y_NM.shape[1]):
        return F.grouped_mm(x_NK.contiguous().mT, y_NM.contiguous(), offs=offsets_E)
    e_N, c_N, C = _places(offsets_E)
    x_ECK, y_ECM = (_padded(z, e_N, c_N, len(offsets_E), C) for z in (x_NK, y_NM))
    return torch.bmm(x_ECK.mT, y_ECM)


@_grouped.register_fake
def _(x_NK: torch.Tensor, w_EKM: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    del offsets_E
    return x_NK.new_empty(x_NK.shape[0], w_EKM.shape[2])


@_grouped_outer.register_fake
def _(x_NK: torch.Tensor, y_NM: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return x_NK.new_empty(offsets_E.shape[0], x_NK.shape[1], y_NM.shape[1])


def _keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_NM: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    x_NK, w_EKM, offsets_E = ctx.saved_tensors
    x_needed, w_needed, _ = ctx.needs_input_grad
    return (
        _grouped(grad_NM, w_EKM.mT, offsets_E) if x_needed else None,
        _grouped_outer(x_NK, grad_NM, offsets_E) if w_needed else None,
        None,
    )


_grouped.register_autograd(_backward, setup_context=_keep)


def _fits(x_NK: torch.Tensor, *widths: int) -> bool:
    """Whether torch's `grouped_mm` is the way for rows of that type and these widths."""
    kind, size = f"{x_NK.dtype} on {x_NK.device.type}", x_NK.element_size()
    if not hasattr(F, "grouped_mm"):
        _say("padded batches: this torch has no grouped_mm")
    elif kind not in KINDS:
        _say(f"padded batches: grouped_mm is not used for {kind}")
    elif any(width * size % ALIGNMENT for width in widths):
        _say(f"padded batches: grouped_mm needs d_model and d_ff to be multiples of {ALIGNMENT // size} in {kind}")
    else:
        _say(f"torch's grouped_mm in {kind}")
        return len(x_NK) > 0
    return False


@cache
def _say(way: str) -> None:
    log.info("experts: %s", way)


def _places(offsets_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(group of each row, its place in the group, rows to pad groups to).

    The longest group, rounded up to one of four lengths an octave, so that few shapes come up and kernels are reused.
    """
    ends_E = offsets_E.long()
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    e_N = torch.repeat_interleave(counts_E)
    c_N = torch.arange(len(e_N), device=e_N.device) - (ends_E - counts_E)[e_N]
    longest = int(counts_E.max())
    step = 1 << max((longest - 1).bit_length() - 3, 0)
    return e_N, c_N, -(-longest // step) * step


def _padded(x_NK: torch.Tensor, e_N: torch.Tensor, c_N: torch.Tensor, groups: int, rows: int) -> torch.Tensor:
    x_ECK = x_NK.new_zeros(groups, rows, x_NK.shape[1])
    x_ECK[e_N, c_N] = x_NK
    return x_ECK
