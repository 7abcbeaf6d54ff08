"""Operators in C++ where torch has none of the speed that a CPU allows, compiled at their first use.

    y_MS   = torch.ops.sky.few_rows(x_MK, [w_NK, ...], [scales_N, ...])                   few_rows.cpp
    y_MS   = torch.ops.sky.few_rows_int4(x_MK, [codes, ...], [scales_gN2, ...], group)    few_rows_int4.cpp
    y_BGRF = torch.ops.sky.few_queries(q_BGRE, k_BGSE, v_BGSF, bias, scale)               few_queries.cpp
    y_BHTF, logsum_BHT = torch.ops.sky.flash(q_BHTE, k_BGTE, v_BGTF, scale, causal)       flash.cpp

The first three are what a step of decoding is made of, passes over memory with next to no arithmetic: 1 to 8 rows with
matrices of fp32, bf16, int8 (`scales` multiply the output features, there are none for the others) or 4 bits, whose
results lie side by side; and attention of one new token of each row under a bias that expands to (B, G, R, S). They
take and give fp32 or bf16, sum in fp32, and have no gradients. 4 bits need AVX512_VNNI and AVX512_VBMI; rows that meet
them (and int8, with AVX512_VNNI) are rounded to 16 bits. The last is attention of whole sequences in bf16, with
gradients, on CPUs that multiply bf16 (AVX512_BF16).

`load()` compiles them with the machine's C++ compiler (`torch.compile` needs one as well), keeps them in the user's
cache, and registers them. It is called where compiling was asked for: by `train.compile` and compiled decoding.
"""

from __future__ import annotations

import logging
import subprocess
from functools import cache
from typing import Any

import torch

from sky_core.native.build import has, library

log = logging.getLogger(__name__)

MOST_ROWS = 8
"""Rows that `few_rows` and `few_rows_int4` take."""
PANEL = 64
"""Output features of a panel of `few_rows_int4`."""
STEP = 32
"""`few_queries` takes heads whose width is a multiple of this."""
FLASH_STEP = 16
"""`flash` takes heads whose width is a multiple of this."""

has_flash = False
"""Whether `torch.ops.sky.flash` is there."""
int8_rows = 2
"""Most rows for which `few_rows` beats torch's kernel for int8: all of them with VNNI."""
has_int4 = False
"""Whether `torch.ops.sky.few_rows_int4` is there."""


@cache
def load() -> bool:
    """Register the operators; false, and one warning, where they cannot be compiled."""
    global has_flash, has_int4, int8_rows
    try:
        torch.ops.load_library(str(library()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("native operators: none, torch's take their place: %s", reason.strip().splitlines()[0])
        return False
    torch.library.register_fake("sky::few_rows", _few_rows)
    torch.library.register_fake("sky::few_queries", _few_queries)
    if has("avx512_vnni"):
        int8_rows = MOST_ROWS
    if has("avx512_vnni", "avx512_vbmi"):
        torch.library.register_fake("sky::few_rows_int4", _few_rows)
        has_int4 = True
    if has("avx512_bf16"):
        torch.library.register_fake("sky::flash", _flash)
        torch.library.register_fake("sky::flash_backward", _flash_backward)
        torch.library.register_autograd("sky::flash", _differentiate, setup_context=_keep)
        has_flash = True
    missing = [
        what for what, there in (("int4", has_int4), ("bf16 attention of whole sequences", has_flash)) if not there
    ]
    why = "this CPU lacks the instructions, or torch does not know"
    log.info("native operators: %s", f"all but {', '.join(missing)} ({why})" if missing else "all")
    return True


# What the compiler must know of results.


def _few_rows(x: torch.Tensor, w: list[torch.Tensor], *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(len(w_NK) for w_NK in w))


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
