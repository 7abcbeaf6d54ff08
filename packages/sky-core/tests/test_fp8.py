"""Linear layers in fp8, held to their equations; torch has the product on CPUs too, where it is slow and exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sky_core.errors import ConfigError
from sky_core.testing.workbench import tiny_model
from sky_core.training.engine import LocalEngine
from sky_core.training.fp8 import BACKWARD, FORWARD, Fp8Linear, quantize, require_fp8, use_fp8


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(z: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """What the hardware multiplies, written down in float64."""
    scale = z.abs().max().double() / torch.finfo(kind).max
    return (z.double() / scale).to(kind).double() * scale


@pytest.mark.parametrize("kind", [FORWARD, BACKWARD])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_a_tensor_of_any_size_is_scaled_to_the_range_of_its_format(kind: torch.dtype, size: float) -> None:
    z = noise(64, 32) * size
    z8, scale = quantize(z, kind)
    assert z8.dtype == kind
    assert z8.float().abs().max() == torch.finfo(kind).max
    # Half a step of a mantissa of 3 or 2 bits; below the smallest normal number steps are of one size.
    step = {FORWARD: 2**-4, BACKWARD: 2**-3}[kind]
    error = (z8.double() * scale - z.double()).abs()
    assert (error <= step * z.double().abs() + scale.double() * torch.finfo(kind).tiny).all()


def test_zeros_stay_zeros() -> None:
    z8, scale = quantize(torch.zeros(16, 16), FORWARD)
    assert scale.isfinite()
    assert not z8.float().any()


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_the_equations(bias: bool) -> None:
    layer = nn.Linear(32, 48, bias=bias)
    use_fp8(nn.Sequential(layer))
    assert type(layer) is Fp8Linear
    x_BTK, g_BTM = noise(2, 8, 32).requires_grad_(), noise(2, 8, 48, seed=1).bfloat16()
    y_BTM = layer(x_BTK)
    y_BTM.backward(g_BTM)
    x, w, g = (rounded(z.detach(), kind) for z, kind in (
        (x_BTK.bfloat16().flatten(0, 1), FORWARD), (layer.weight, FORWARD), (g_BTM.flatten(0, 1), BACKWARD),
    ))  # fmt: skip
    expected = {
        "y": (y_BTM.flatten(0, 1), x @ w.T + (layer.bias.double() if bias else 0.0)),
        "dx": (x_BTK.grad.flatten(0, 1), g @ w),
        "dw": (layer.weight.grad, g.T @ x),
    }
    for name, (actual, wanted) in expected.items():
        # The results are bf16 but for dw: half a step is 2⁻⁹.
        assert (actual.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max(), name
    if bias:
        torch.testing.assert_close(layer.bias.grad, g_BTM.float().sum((0, 1)), rtol=0.02, atol=0.02)


def test_rows_that_do_not_fit_the_hardware_are_multiplied_as_ever() -> None:
    layer = nn.Linear(32, 48)
    x = noise(3, 5, 32)
    expected = layer(x)
    use_fp8(nn.Sequential(layer))
    assert torch.equal(layer(x), expected)


def test_only_plain_linear_layers_of_fitting_widths_change_and_names_stay() -> None:
    model = tiny_model(41, d_model=32, feedforward={"kind": "moe", "n_experts": 4, "d_ff": 16, "n_shared": 1})
    names = list(model.state_dict())
    use_fp8(model.layers)
    assert list(model.state_dict()) == names
    changed = {name.rpartition(".")[2] for name, one in model.named_modules() if type(one) is Fp8Linear}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert use_fp8(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))) == 0


@pytest.mark.parametrize("policy", ["none", "selective", "block"])
def test_a_model_learns_in_fp8_almost_as_in_bf16(policy: str) -> None:
    def losses(fp8: bool) -> list[float]:
        model = tiny_model(41, d_model=32).train()
        model.activation_checkpointing = policy  # type: ignore[assignment]
        if fp8:
            use_fp8(model.layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        tokens_BT = torch.randint(41, (4, 16), generator=torch.Generator().manual_seed(0))
        seen = []
        for _ in range(20):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(tokens_BT).flatten(0, 1), tokens_BT.roll(-1, 1).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    low, high = losses(True), losses(False)
    assert low != high
    assert low[-1] < low[0] - 0.5
    assert abs(low[-1] - high[-1]) < 0.05 * high[0]


def test_without_the_hardware_it_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision: fp8 needs an NVIDIA GPU .* here is cpu; use auto"):
        require_fp8(torch.device("cpu"))
    engine: Any = LocalEngine()
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="fp8 needs"):
            engine.setup("fp8", compile=False)
