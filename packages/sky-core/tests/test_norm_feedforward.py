"""Norms and feed-forward parts, held to their equations in float64."""

from __future__ import annotations

import pytest
import torch

from sky_core.components.layers import GELU, LayerNorm, ReLU, ReLU2, RMSNorm, SwiGLU
from sky_core.slots import LayerSpec


def layernorm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | float, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_layernorm_is_its_equation(eps: float, bias: bool) -> None:
    norm, x = shaken(LayerNorm(eps=eps, bias=bias).build(12)), 3 + torch.randn(2, 5, 12)
    expected = layernorm(x.double(), norm.weight.double(), norm.bias.double() if bias else 0.0, eps)
    torch.testing.assert_close(norm(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_rmsnorm_is_its_equation(eps: float) -> None:
    norm, x = shaken(RMSNorm(eps=eps).build(12)), 3 + torch.randn(2, 5, 12)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("component", [LayerNorm(), RMSNorm()])
def test_norms_compute_in_fp32_and_return_what_they_were_given(component) -> None:
    norm, x = shaken(component.build(512)), (100 * torch.randn(4, 512)).bfloat16()
    actual = norm(x)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, norm(x.float()).bfloat16())  # one rounding, at the end
    assert norm.bfloat16()(x).dtype == torch.bfloat16


SPEC = LayerSpec(
    vocab_size=64,
    d_model=12,
    n_head=2,
    n_kv_head=2,
    head_dim=6,
    layer=0,
    n_layer=1,
    max_length=8,
    dropout=0.0,
    bias=True,
    initializer_range=0.02,
    norm=torch.nn.LayerNorm,
)


def phi(x: torch.Tensor) -> torch.Tensor:
    """The distribution function of the standard normal."""
    return 0.5 * (1 + torch.erf(x / 2**0.5))


@pytest.mark.parametrize(
    ("component", "act"),
    [
        (GELU(), lambda x: x * phi(x)),
        (GELU(approximate="tanh"), lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        (ReLU(), lambda x: x.clamp(min=0)),
        (ReLU2(), lambda x: x.clamp(min=0) ** 2),
    ],
    ids=["gelu", "gelu-tanh", "relu", "relu2"],
)
def test_a_plain_part_is_its_equation(component, act) -> None:
    part, x = shaken(component.build(SPEC)).double(), torch.randn(2, 3, 12, dtype=torch.float64)
    assert part.up_proj.out_features == 48
    hidden = act(x @ part.up_proj.weight.T + part.up_proj.bias)
    torch.testing.assert_close(part(x, None), hidden @ part.down_proj.weight.T + part.down_proj.bias)


def test_swiglu_is_its_equation() -> None:
    part, x = shaken(SwiGLU(d_ff=20).build(SPEC)).double(), torch.randn(2, 3, 12, dtype=torch.float64)
    gate = x @ part.gate_proj.weight.T + part.gate_proj.bias
    up = x @ part.up_proj.weight.T + part.up_proj.bias
    expected = (gate / (1 + torch.exp(-gate)) * up) @ part.down_proj.weight.T + part.down_proj.bias
    torch.testing.assert_close(part(x, None), expected)


@pytest.mark.parametrize("component", [GELU(d_ff=7), SwiGLU(d_ff=7), ReLU(d_ff=7), ReLU2(d_ff=7)])
def test_the_hidden_width_can_be_chosen(component) -> None:
    assert component.build(SPEC).down_proj.in_features == 7
