"""Attention kernels: softmax(scale QKᵀ)V under a declarative mask (Vaswani et al. 2017, section 3.2.1, equation 1).

    naive   the equation as it stands: holds the weights, runs anywhere, the one to read and to differentiate by hand
    sdpa    torch's fused scaled_dot_product_attention: never holds the weights (CPU and CUDA flash)
    auto    sdpa, and naive where sdpa has no way (scores with a soft cap)

A model that is told to (`use_operators`) takes the flash attention of `sky_core.native` before these where it serves.

Relative to the paper: H query heads may share G key/value heads (Ainslie et al. 2023, grouped queries; head h reads
group h // (H / G)), a query that may see no key gives 0 instead of NaN, and softmax runs in at least fp32. Scores may
be bounded softly, c tanh(score / c) (Gemma 2, arXiv:2408.00118, section 2), then what `Mask.bias` says is added.

B batch, H query heads, G key/value heads, R = H / G, T queries, S keys, E width of q and k, F width of v.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange

from sky_core import native
from sky_core.errors import UserError
from sky_core.model.mask import Mask

log = logging.getLogger(__name__)

Kernel = Callable[..., torch.Tensor]

SHORT = 256
"""Most tokens of a row that `sdpa` is trained on in fp32 on a CPU, whatever the precision around it."""


def dense_mask(mask: Mask, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """`mask.dense(...)`, computed once per forward pass."""
    return mask.once(("dense", queries, keys), lambda: mask.dense(queries, keys, device))


def score_bias(mask: Mask, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """`mask.bias(...)`, computed once per forward pass."""
    return mask.once(("bias", queries, keys), lambda: mask.bias(queries, keys, device))


def attention_weights(
    q_BHTE: torch.Tensor, k_BGSE: torch.Tensor, mask: Mask, *, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """a_BHTS = softmax(scale QKᵀ) under the mask, at least fp32; rows sum to 1, or to 0 where nothing may be seen."""
    queries, keys = q_BHTE.shape[2], k_BGSE.shape[2]
    q_BGRTE = rearrange(q_BHTE, "B (G R) T E -> B G R T E", G=k_BGSE.shape[1])
    scores_BHTS = (q_BGRTE @ k_BGSE[:, :, None].transpose(-1, -2)).flatten(1, 2) * scale
    if scores_BHTS.dtype in (torch.bfloat16, torch.float16):
        scores_BHTS = scores_BHTS.float()
    if softcap is not None:
        scores_BHTS = softcap * (scores_BHTS / softcap).tanh()
    bias_BHTS = score_bias(mask, queries, keys, scores_BHTS.device)
    if bias_BHTS is not None:
        scores_BHTS = scores_BHTS + bias_BHTS
    hidden = ~dense_mask(mask, queries, keys, scores_BHTS.device)
    # The lowest finite number, not -inf: a row with nothing to see must have finite gradients too.
    scores_BHTS = scores_BHTS.masked_fill(hidden, torch.finfo(scores_BHTS.dtype).min)
    return scores_BHTS.softmax(dim=-1).masked_fill(hidden, 0.0)


def naive(
    q_BHTE: torch.Tensor,
    k_BGSE: torch.Tensor,
    v_BGSF: torch.Tensor,
    mask: Mask,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """y_BHTF by the equation; `dropout` acts on the weights."""
    weights_BHTS = attention_weights(q_BHTE, k_BGSE, mask, scale=scale, softcap=softcap)
    a_BGRTS = rearrange(
        F.dropout(weights_BHTS, dropout).to(v_BGSF.dtype), "B (G R) T S -> B G R T S", G=v_BGSF.shape[1]
    )
    return (a_BGRTS @ v_BGSF[:, :, None]).flatten(1, 2)


def sdpa(
    q_BHTE: torch.Tensor,
    k_BGSE: torch.Tensor,
    v_BGSF: torch.Tensor,
    mask: Mask,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """y_BHTF by torch's fused attention. Raises `UserError` for a `softcap`, which that has no way to apply."""
    if softcap is not None:
        raise UserError("kernel sdpa cannot cap scores (softcap): use kernel: naive or auto")
    if _better_in_fp32(q_BHTE):
        q, k, v = q_BHTE.float(), k_BGSE.float(), v_BGSF.float()
        with torch.autocast("cpu", enabled=False):
            return sdpa(q, k, v, mask, scale=scale, dropout=dropout).to(q_BHTE.dtype)
    heads, groups = q_BHTE.shape[1], k_BGSE.shape[1]
    queries = q_BHTE.shape[2]
    row_ends = mask.slots_BT is None and mask.keys_BS is None
    if queries == 1 and row_ends and not mask.front and mask.documents_BS is None:
        # One new token at the end of its row sees everything, or its window: cut the keys instead of masking them.
        if mask.window is not None:
            k_BGSE, v_BGSF = k_BGSE[:, :, -mask.window :], v_BGSF[:, :, -mask.window :]
        bias, is_causal = _additive(mask, 1, k_BGSE.shape[2], q_BHTE, masked=False), False
    else:
        bias, is_causal = _lowered(mask, queries, k_BGSE.shape[2], q_BHTE)
    if queries == 1 and groups < heads:
        # A group's queries become rows over the keys they share: half the time of enable_gqa when decoding.
        q_BGRE = q_BHTE.view(len(q_BHTE), groups, heads // groups, -1)
        if bias is not None and bias.shape[1] == heads:
            bias = bias.view(len(bias), groups, heads // groups, -1)
        y_BGRF = F.scaled_dot_product_attention(q_BGRE, k_BGSE, v_BGSF, bias, dropout, is_causal, scale=scale)
        return y_BGRF.view(len(q_BHTE), heads, 1, -1)
    return F.scaled_dot_product_attention(
        q_BHTE, k_BGSE, v_BGSF, bias, dropout, is_causal, scale=scale, enable_gqa=groups < heads
    )


def _better_in_fp32(q_BHTE: torch.Tensor) -> bool:
    """Whether torch's backward pass would spend its time on preparing products in bfloat16: on CPUs, where sequences
    are short (measured: 1.3 times as fast in fp32 at 256 tokens, 2.4 times at 128, slower from 512 on)."""
    short = q_BHTE.shape[2] <= SHORT
    return short and q_BHTE.device.type == "cpu" and q_BHTE.dtype == torch.bfloat16 and q_BHTE.requires_grad


def _lowered(mask: Mask, queries: int, keys: int, like: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
    """(additive mask or None, is_causal) for torch. `is_causal` counts from the first key: right only when T == S."""
    if mask.is_plain_causal and queries == keys:
        return None, True
    everything = not mask.causal and mask.window is None and mask.documents_BS is None and mask.keys_BS is None
    return _additive(mask, queries, keys, like, masked=not everything), False


def _additive(mask: Mask, queries: int, keys: int, like: torch.Tensor, *, masked: bool) -> torch.Tensor | None:
    """What torch adds to the scores: the bias of the mask and, where `masked`, -inf for what may not be seen."""
    if not masked and mask.slopes_H is None:
        return None
    dtype = like.dtype
    if mask.slopes_H is not None and like.device.type == "cpu":
        dtype = torch.promote_types(
            dtype, torch.float32
        )  # CUDA wants that of q: bf16 rounds a bias -b by up to b / 512

    def additive() -> torch.Tensor:
        bias = score_bias(mask, queries, keys, like.device)
        if not masked:
            assert bias is not None
            return bias.to(dtype)
        allowed = dense_mask(mask, queries, keys, like.device)
        bias = torch.zeros_like(allowed, dtype=dtype) if bias is None else bias.to(dtype)
        return bias.masked_fill(~allowed, -torch.inf)

    return mask.once(("additive", queries, keys, dtype, masked), additive)


def auto(
    q_BHTE: torch.Tensor,
    k_BGSE: torch.Tensor,
    v_BGSF: torch.Tensor,
    mask: Mask,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """y_BHTF by the fastest kernel of core that can do it."""
    if softcap is None:
        return sdpa(q_BHTE, k_BGSE, v_BGSF, mask, scale=scale, dropout=dropout)
    return naive(q_BHTE, k_BGSE, v_BGSF, mask, scale=scale, dropout=dropout, softcap=softcap)


def flash_or(
    kernel: Kernel,
    q_BHTE: torch.Tensor,
    k_BGSE: torch.Tensor,
    v_BGSF: torch.Tensor,
    mask: Mask,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """y_BHTF by the flash attention of `sky_core.native` where it serves (bf16 on a CPU, whole sequences, all or the
    past to be seen), else by `kernel`."""
    tensors = (q_BHTE, k_BGSE, v_BGSF)
    on_cpu = q_BHTE.device.type == "cpu"
    fits = all(x.dtype == torch.bfloat16 and x.shape[3] % native.FLASH_STEP == 0 and x.stride(3) == 1 for x in tensors)
    whole = 1 < q_BHTE.shape[2] == k_BGSE.shape[2] and (mask.is_plain_causal or mask.sees_everything)
    if on_cpu and fits and whole and not dropout and softcap is None:
        y_BHTF: torch.Tensor = torch.ops.sky.flash(q_BHTE, k_BGSE, v_BGSF, scale, mask.causal)[0]
        return y_BHTF
    return kernel(q_BHTE, k_BGSE, v_BGSF, mask, scale=scale, dropout=dropout, softcap=softcap)


WITH_FLASH: dict[Kernel, Kernel] = {kernel: functools.partial(flash_or, kernel) for kernel in (sdpa, auto)}
"""Kernel -> the same behind flash attention of our own."""


@functools.cache
def choose() -> Kernel:
    """The kernel `auto` stands for; says in the log, once in a process, what it takes."""
    log.info(
        "attention kernel auto: sdpa (torch.nn.functional.scaled_dot_product_attention; in training on a CPU, unless an"
        " operator of our own takes its place, up to %d tokens in fp32), naive for capped scores",
        SHORT,
    )
    return auto
