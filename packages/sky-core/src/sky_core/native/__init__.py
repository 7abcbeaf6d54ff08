"""Operators in C++ where torch has none of the speed that a CPU allows, compiled at their first use.

    y_MN   = torch.ops.sky.few_rows(x_MK, w_NK, scales_N=None)                     few_rows.cpp
    y_BGRF = torch.ops.sky.few_queries(q_BGRE, k_BGSE, v_BGSF, bias, scale)        few_queries.cpp
    y_BHTF, logsum_BHT = torch.ops.sky.flash(q_BHTE, k_BGTE, v_BGTF, scale, causal)      flash.cpp

The first two are what a step of decoding is made of, passes over memory with next to no arithmetic: 1 to 8 rows with a
matrix of fp32, bf16 or int8 (`scales` multiply its output features), and attention of one new token of each row under
a bias that expands to (B, G, R, S). They compute in fp32, take and give fp32 or bf16, and have no gradients. The third
is attention of whole sequences in bf16, with gradients, on CPUs that multiply bf16 (AVX512_BF16).

`load()` compiles them with the machine's C++ compiler (`torch.compile` needs one as well), keeps them in the user's
cache, and registers them. It is called where compiling was asked for: by `train.compile` and compiled decoding.
"""

from __future__ import annotations

import logging
import subprocess
from functools import cache
from typing import Any

import torch

from sky_core.native.build import library, multiplies_bf16

log = logging.getLogger(__name__)

MOST_ROWS = 8
"""Rows that `few_rows` takes."""
STEP = 32
"""`few_queries` takes heads whose width is a multiple of this."""
FLASH_STEP = 16
"""`flash` takes heads whose width is a multiple of this."""

has_flash = False
"""Whether `torch.ops.sky.flash` is there."""


@cache
def load() -> bool:
    """Register the operators; false, and one warning, where they cannot be compiled."""
    global has_flash
    try:
        torch.ops.load_library(str(library()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("native operators: none, torch's take their place: %s", reason.strip().splitlines()[0])
        return False
    torch.library.register_fake("sky::few_rows", _few_rows)
    torch.library.register_fake("sky::few_queries", _few_queries)
    if multiplies_bf16():
        torch.library.register_fake("sky::flash", _flash)
        torch.library.register_fake("sky::flash_backward", _flash_backward)
        torch.library.register_autograd("sky::flash", _differentiate, setup_context=_keep)
        has_flash = True
    said = "bf16 attention of whole sequences too" if has_flash else "for decoding (this CPU does not multiply bf16)"
    log.info("native operators: %s", said)
    return True


# What the compiler must know of results.


def _few_rows(x_MK: torch.Tensor, w_NK: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return x_MK.new_empty(len(x_MK), len(w_NK))


def _few_queries(q_BGRE: torch.Tensor, _k: object, v_BGSF: torch.Tensor, *_: object) -> torch.Tensor:
    return q_BGRE.new_empty(*q_BGRE.shape[:3], v_BGSF.shape[3])


def _flash(q_BHTE: torch.Tensor, _k: object, v_BGTF: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    y_BHTF = q_BHTE.new_empty(*q_BHTE.shape[:3], v_BGTF.shape[3])
    return y_BHTF, q_BHTE.new_empty(q_BHTE.shape[:3], dtype=torch.float32)


def _flash_backward(_dy: object, *tensors: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[:3])


# The gradient of `flash`.


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *qkv, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    dq, dk, dv = torch.ops.sky.flash_backward(dy, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return dq, dk, dv, None, None
