"""The mixture of experts computes what those of Mixtral, Qwen3-MoE and DeepSeek-V3 compute with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sky_core.components.moe import MixtureOfExperts
from sky_core.model.init import init_weights
from sky_core.testing.workbench import context, layer_spec

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: E402

D, F, TOKENS = 32, 24, 61


def mixtral(n_experts: int, top_k: int) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=n_experts, num_experts_per_tok=top_k
    )
    return MixtralSparseMoeBlock(eagerly(config)), {"n_experts": n_experts, "top_k": top_k}


def qwen3(n_experts: int, top_k: int, norm_topk: bool) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Qwen3MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        num_experts=n_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=norm_topk,
    )
    options = {"n_experts": n_experts, "top_k": top_k, "norm_topk": norm_topk}
    return Qwen3MoeSparseMoeBlock(eagerly(config)), options


def deepseek(
    n_experts: int, top_k: int, n_groups: int, top_groups: int, norm_topk: bool = True, n_shared: int = 1
) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=n_experts,
        num_experts_per_tok=top_k,
        n_group=n_groups,
        topk_group=top_groups,
        norm_topk_prob=norm_topk,
        n_shared_experts=n_shared,
        routed_scaling_factor=2.5,
    )
    options = {
        "n_experts": n_experts,
        "top_k": top_k,
        "n_groups": n_groups,
        "top_groups": top_groups,
        "norm_topk": norm_topk,
        "n_shared": n_shared,
        "router": "sigmoid",
        "routed_scale": 2.5,
    }
    return DeepseekV3MoE(eagerly(config)), options


def eagerly(config: Any) -> Any:
    config._experts_implementation = "eager"  # a loop over the experts, not the grouped product that is held to it
    return config


CASES = {
    "mixtral": lambda: mixtral(8, 2),
    "mixtral, all experts": lambda: mixtral(4, 4),
    "qwen3": lambda: qwen3(16, 4, True),
    "qwen3, weights as they are": lambda: qwen3(16, 4, False),
    "deepseek": lambda: deepseek(16, 4, 4, 2),
    "deepseek, one group": lambda: deepseek(16, 4, 1, 1, norm_topk=False, n_shared=2),
    "deepseek, one of many groups": lambda: deepseek(32, 3, 8, 1),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """(ours, theirs) with the same weights, large ones: with those of a fresh model errors stay hidden."""
    theirs, options = CASES[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for buffer in theirs.buffers():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) - 0.5)
    ours = MixtureOfExperts(d_ff=F, **options).build(layer_spec())
    ours.load_state_dict(renamed(theirs.state_dict()))
    return ours, theirs


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`transformers` keeps gate_proj and up_proj in one tensor in memory."""
    gate, up = state.pop("experts.gate_up_proj").chunk(2, dim=1)
    return {**state, "experts.gate_proj": gate, "experts.up_proj": up}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest: fp32 sums of a hundred terms in another order."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_reference(name: str) -> None:
    ours, theirs = pair(name)
    x_BTD = torch.randn(2, TOKENS, D, generator=torch.Generator().manual_seed(1))
    g_BTD = torch.randn(2, TOKENS, D, generator=torch.Generator().manual_seed(2))
    mine, other = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
    y_BTD, expected_BTD = ours(mine, context(2, 32)), theirs(other)
    close(y_BTD, expected_BTD)
    y_BTD.backward(g_BTD)
    expected_BTD.backward(g_BTD)
    close(mine.grad, other.grad)
    expected = renamed({key: parameter.grad for key, parameter in theirs.named_parameters()})
    for key, parameter in ours.named_parameters():
        close(parameter.grad, expected[key])


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_the_balancing_loss_is_that_of_the_reference(top_k: int, padded: bool) -> None:
    layer = MixtureOfExperts(n_experts=8, top_k=top_k, d_ff=F, norm_topk=False, aux_loss=1.0).build(layer_spec())
    init_weights(layer, 1.0, 3)
    x_BTD = torch.randn(2, 31, D, generator=torch.Generator().manual_seed(1))
    counts = [31, 12]
    ctx = context(2, 31, counts=counts if padded else None)
    layer.train()(x_BTD, ctx)
    logits_NE = nn.functional.linear(x_BTD.flatten(0, 1), layer.gate.weight)
    expected = load_balancing_loss_func((logits_NE,), 8, top_k, ctx.valid_BT)
    close(ctx.losses["aux_loss"], expected)
    (ours,), (theirs,) = (torch.autograd.grad(loss, layer.gate.weight) for loss in (ctx.losses["aux_loss"], expected))
    close(ours, theirs)
