"""AdamW written out: against the equations in float64 and against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sky_core.training.adamw import AdamW, FusedAdamW

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.97), "eps": 1e-8, "weight_decay": 0.2}
SHAPES = [(7, 5), (5,), (3, 4, 2), ()]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    scale = 10.0 ** (step % 5 - 3)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for parameter, gradient in zip(own, gradients(step, own[0].dtype), strict=True):
            parameter.grad = gradient
        optimizer.step()


def test_it_is_the_papers_algorithm_in_float64() -> None:
    own = parameters(torch.float64)
    run(AdamW(own, **OPTIONS), own, 20)
    (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
    for index, start in enumerate(parameters(torch.float64)):
        theta = start.detach().clone()
        m, v = torch.zeros_like(theta), torch.zeros_like(theta)
        for t in range(1, 21):
            g = gradients(t - 1, torch.float64)[index]
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + OPTIONS["eps"])
            theta = theta - lr * OPTIONS["weight_decay"] * theta - lr * update
        torch.testing.assert_close(own[index].detach(), theta, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kernel", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_it_equals_torchs(kernel: dict[str, bool]) -> None:
    ours, theirs = parameters(), parameters()
    run(AdamW(ours, **OPTIONS), ours, 50)
    run(torch.optim.AdamW(theirs, **OPTIONS, **kernel), theirs, 50)
    for mine, other in zip(ours, theirs, strict=True):
        # fp32: 50 updates, each rounded to half a unit in the last place of parameters around 1.
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)


def test_a_parameter_without_gradient_waits_and_keeps_its_own_count() -> None:
    moved, waiting = parameters()[:2]
    before = waiting.detach().clone()
    optimizer = AdamW([moved, waiting], **OPTIONS)
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert torch.equal(waiting, before)
    waiting.grad = torch.ones_like(waiting)
    optimizer.step()
    assert optimizer.state[moved]["step"] == 2
    assert optimizer.state[waiting]["step"] == 1
    # A first update is a signed step of lr whatever the gradient's size; the decay comes on top.
    expected = before * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) - OPTIONS["lr"]
    torch.testing.assert_close(waiting.detach(), expected)


def test_the_fused_kernel_without_the_compilers_wrappers_is_torchs_bit_for_bit() -> None:
    ours, theirs = parameters(), parameters()
    mine, other = FusedAdamW(ours, **OPTIONS, fused=True), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    run(mine, ours, 20)
    run(other, theirs, 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert mine.state[a].keys() == other.state[b].keys()
        assert all(torch.equal(mine.state[a][key], other.state[b][key]) for key in mine.state[a])
    mine.zero_grad()
    assert all(parameter.grad is None for parameter in ours)


def test_steps_are_announced_to_hooks_and_need_no_gradients_of_their_own() -> None:
    own = parameters()
    optimizer = FusedAdamW([{"params": own[:1]}, {"params": own[1:], "lr": 1.0}], **OPTIONS, fused=True)
    assert [group["lr"] for group in optimizer.param_groups] == [OPTIONS["lr"], 1.0]
    announced: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: announced.append("before"))
    optimizer.register_step_post_hook(lambda *_: announced.append("after"))
    run(optimizer, own, 2)
    assert announced == ["before", "after"] * 2
    assert all(parameter.is_leaf and parameter.grad_fn is None for parameter in own)
