"""Weights in few bits against torchao, which makes the operands of the same kernels."""

from __future__ import annotations

import pytest
import torch

from sky_core.quantization.int4 import quantize_groups
from sky_core.quantization.int8 import quantize_rows
from sky_core.testing.workbench import noise

reason = "torchao is the oracle"
primitives = pytest.importorskip("torchao.quantization.quant_primitives", reason=reason)
utils = pytest.importorskip("torchao.quantization.utils", reason=reason)


def test_int8_rounds_as_torchao_does() -> None:
    w_NK = noise(40, 96)
    ours_NK, scales_N = quantize_rows(w_NK)
    theirs_NK = primitives.quantize_affine(w_NK, (1, 96), scales_N[:, None], torch.zeros(40, 1), torch.int8, -127, 127)
    assert ours_NK.equal(theirs_NK)
    # Its own scales are absmax / 127.5 of unrounded weights: less than a part in 127 away.
    own_N1, _ = primitives.choose_qparams_affine(w_NK, primitives.MappingType.SYMMETRIC, (1, 96), torch.int8)
    assert ((scales_N / own_N1.flatten() - 1).abs() < 1 / 127).all()


@pytest.mark.parametrize("group", [32, 64])
def test_int4_groups_are_those_of_torchao(group: int) -> None:
    w_NK = noise(40, 192)
    codes_NK, scales_gN, zeros_gN = quantize_groups(w_NK, group)
    own_Ng, own_zeros_Ng = utils.get_groupwise_affine_qparams(w_NK, 4, group, torch.bfloat16)
    # Both round to bf16 (2^-8); its zeros are computed of scales that are not rounded yet.
    torch.testing.assert_close(scales_gN.T, own_Ng.float(), rtol=2**-7, atol=0)
    torch.testing.assert_close(zeros_gN.T, own_zeros_Ng.float(), rtol=0, atol=(8 * scales_gN).max().item() * 2**-7)
    theirs_NK = utils.groupwise_affine_quantize_tensor_from_qparams(
        w_NK, scales_gN.T.contiguous(), zeros_gN.T.contiguous(), 4, group
    )
    if theirs_NK.shape != codes_NK.shape:  # packed in pairs, the even one in the high half
        theirs_NK = torch.stack((theirs_NK >> 4, theirs_NK & 15), dim=-1).flatten(1)
    assert (theirs_NK.int() - codes_NK.int()).abs().max() <= 1
    assert (theirs_NK.int() == codes_NK.int()).float().mean() > 0.999  # ties of fp32
