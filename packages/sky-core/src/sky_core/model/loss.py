"""Cross-entropy straight from hidden states: the logits of all tokens are never held at once.

With logits z_n = W h_n and p_n = softmax(z_n), the summed loss over tokens that carry a target y_n is

    loss = Σ_n logsumexp(z_n) - z_n[y_n]
    dloss/dz_n = p_n - onehot(y_n),   dloss/dh_n = Wᵀ dz_n,   dloss/dW = Σ_n dz_n h_nᵀ

The loss is a sum and the last operation of a step, so its gradients are known up to one scalar factor: they are made
in the forward pass, chunk by chunk, and the logits of a chunk are gone before the next (Wijmans et al. 2024, Cut your
losses, arXiv:2411.09009, section 3, and Hsu et al. 2024, Liger Kernel, arXiv:2410.10989, section 3.2, do this fused on
a GPU). A cap on the logits (Gemma 2, arXiv:2408.00118, section 2) multiplies dloss/dz by its slope 1 - tanh²(z / c).
Memory: N D + V D numbers for the gradients and one chunk of logits, instead of 2 N V.

N tokens, D model width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sky_core.data.dataset import IGNORE

Chunk = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""(logits_CV, targets_C, softcap, dtype of sums, gradient wanted) -> (summed loss, dloss/dz_CV or None)."""

CHUNK_BYTES = 64 * 2**20
"""Bytes of fp32 logits that are held at a time."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight_VD: torch.Tensor,
    targets: torch.Tensor,
    *,
    softcap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    chunk: Chunk | None = None,
) -> torch.Tensor:
    """Summed negative log-likelihood (nats, an fp32 scalar) of `targets` (...) under softmax(cap(W h)), h from `hidden`
    (..., D); targets equal to IGNORE are left out. `softcap` c bounds the logits: cap(z) = c tanh(z / c).

    Under autocast the products run in its dtype, as those of a linear layer would; softmax and sums in fp32.
    `chunk` is `compiled_chunk()` where what lies between the products shall be fused.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    rows = _chunk_rows(len(weight_VD), chunk_bytes)
    gradients = torch.is_grad_enabled()
    loss: torch.Tensor = _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight_VD, targets.flatten(), softcap, rows, dtype, gradients, chunk or _chunk
    )
    return loss


def cross_entropy_of_head(
    head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """The same loss for any head (..., D) -> (..., V): chunks of logits are computed again in the backward pass."""

    def chunk_loss(hidden_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden_CD).float(), targets_C, ignore_index=IGNORE, reduction="sum")

    rows = _chunk_rows(vocab_size, chunk_bytes)
    chunks = zip(hidden.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True)
    return torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _chunk_rows(vocab_size: int, chunk_bytes: int) -> int:
    return max(1, chunk_bytes // (4 * vocab_size))


def _chunk(
    z_CV: torch.Tensor, y_C: torch.Tensor, softcap: float | None, wide: torch.dtype, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The summed loss of a chunk and, where wanted, dloss/dz_CV in the dtype of z."""
    dtype, ignored_C1 = z_CV.dtype, (y_C == IGNORE)[:, None]
    y_C1 = y_C[:, None].masked_fill(ignored_C1, 0)
    if softcap is not None:
        tanh_CV = (z_CV.to(wide) / softcap).tanh_()
        z_CV = tanh_CV * softcap
    logp_CV = F.log_softmax(z_CV, dim=-1, dtype=wide)
    loss = -logp_CV.gather(1, y_C1).masked_fill(ignored_C1, 0.0).sum()
    if not gradient:
        return loss, None
    if torch.compiler.is_compiling():  # a comparison fuses where a scatter does not
        ids_V = torch.arange(z_CV.shape[1], device=z_CV.device)
        dz_CV = logp_CV.exp() - (ids_V == y_C1).to(wide)
    else:
        dz_CV = logp_CV.exp_()
        dz_CV.scatter_add_(1, y_C1, torch.full_like(y_C1, -1, dtype=wide))
    if softcap is not None:
        dz_CV = dz_CV.mul_(1 - tanh_CV.square())
    return loss, dz_CV.masked_fill_(ignored_C1, 0.0).to(dtype)


def _add(sum_VD: torch.Tensor, part_VD: torch.Tensor) -> torch.Tensor:
    """sum += part, a few rows at a time: on a CPU torch first makes a copy of `part` in the dtype of the sum."""
    for into, rows in zip(sum_VD.split(512), part_VD.split(512), strict=True):
        into.add_(rows)
    return sum_VD


def compiled_chunk(**options: Any) -> Chunk:
    """The loss and the gradient of a chunk in three passes over its logits, by `torch.compile(**options)`."""
    return torch.compile(_chunk, dynamic=True, **options)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        softcap: float | None,
        rows: int,
        dtype: torch.dtype,
        gradients: bool,
        chunk: Chunk,
    ) -> torch.Tensor:
        wants_hidden = gradients and ctx.needs_input_grad[0]
        wants_weight = gradients and ctx.needs_input_grad[1]
        wide = torch.promote_types(dtype, torch.float32)
        h_ND, w_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        dh_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        dw_VD = None
        total = hidden_ND.new_zeros((), dtype=wide)
        wanted = wants_hidden or wants_weight
        compute = chunk if wanted else _chunk
        for start in range(0, max(1, len(h_ND)), rows):  # an empty batch is one empty chunk
            h_CD = h_ND[start : start + rows]
            loss, dz_CV = compute(h_CD @ w_VD.T, targets_N[start : start + rows], softcap, wide, wanted)
            total += loss
            if dz_CV is None:
                continue
            if dh_ND is not None:
                dh_ND[start : start + rows] = dz_CV @ w_VD
            if wants_weight:
                part_VD = dz_CV.T @ h_CD
                dw_VD = part_VD.to(weight_VD.dtype) if dw_VD is None else _add(dw_VD, part_VD)
        ctx.gradients = (dh_ND, dw_VD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dh_ND, dw_VD = (None if gradient is None else gradient * factor for gradient in ctx.gradients)
        return dh_ND, dw_VD, None, None, None, None, None, None
