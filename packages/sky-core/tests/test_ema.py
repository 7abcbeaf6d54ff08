"""The average of the weights: its formula, swapping it in, and resuming."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sky_core.errors import CheckpointError
from sky_core.training.ema import EMA


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    net[1].bias.requires_grad_(False)
    return net


def move(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_the_average_follows_its_formula_with_a_warmed_up_decay() -> None:
    net, decay = model(), 0.5
    ema = EMA(net, decay)
    expected = net[0].weight.detach().double().clone()
    for n in range(1, 12):
        move(net, n)
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * net[0].weight.detach().double()
    torch.testing.assert_close(ema.average["0.weight"].double(), expected, rtol=1e-5, atol=1e-5)  # fp32 against fp64


def test_the_model_is_the_average_inside_and_itself_after_even_after_an_error() -> None:
    net = model()
    ema = EMA(net, 0.9)
    move(net, 1)
    ema.update()
    own = [p.detach().clone() for p in net.parameters()]
    average = {name: value.clone() for name, value in ema.average.items()}

    def fail_inside() -> None:
        with ema.swapped_in():
            assert all(torch.equal(net.get_parameter(name), value) for name, value in average.items())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all(torch.equal(p, before) for p, before in zip(net.parameters(), own, strict=True))
    assert all(torch.equal(ema.average[name], value) for name, value in average.items())


def test_resuming_is_bit_exact() -> None:
    straight, net = model(), model()
    whole, first = EMA(straight, 0.9), EMA(net, 0.9)
    for n in range(6):
        move(straight, n)
        whole.update()
    for n in range(3):
        move(net, n)
        first.update()
    second = EMA(net, 0.9)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for n in range(3, 6):
        move(net, n)
        second.update()
    assert all(torch.equal(whole.average[name], second.average[name]) for name in whole.average)
    assert second.n_updates == whole.n_updates == 6


def test_frozen_parameters_are_left_alone() -> None:
    assert set(EMA(model(), 0.9).average) == {"0.weight", "0.bias", "1.weight"}


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    ema = EMA(model(), 0.9)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'0\.bias' is on one side only"):
        ema.load_state_dict({name: value + 1 for name, value in before.items() if name != "0.bias"})
    with pytest.raises(CheckpointError, match=r"averaged weight 0\.bias: shape \(5,\), the model's is \(4,\)"):
        ema.load_state_dict({**{name: value + 1 for name, value in before.items()}, "0.bias": torch.zeros(5)})
    assert all(torch.equal(ema.state_dict()[name], value) for name, value in before.items())
