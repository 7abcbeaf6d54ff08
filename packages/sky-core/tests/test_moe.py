"""Mixture of experts: held to its equations token by token in float64; grouped products; loads, losses, bad options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from sky_core.components.moe import MixtureOfExperts
from sky_core.model import count, grouped
from sky_core.model.grouped import grouped_linear
from sky_core.model.init import init_weights
from sky_core.testing import FeedForwardContract
from sky_core.testing.workbench import assert_close, context, fresh, layer_spec, noise, shaken

DEEPSEEK = {"router": "sigmoid", "n_groups": 4, "top_groups": 2, "routed_scale": 2.5, "n_shared": 2}


class TestAsInDeepSeek(FeedForwardContract):
    component = MixtureOfExperts(n_experts=8, d_ff=12, aux_loss=0.1, bias_update=0.01, **DEEPSEEK)


class TestWithOddWidths(FeedForwardContract):
    component = MixtureOfExperts(n_experts=5, top_k=3, d_ff=7, norm_topk=False, z_loss=0.1)


class TestOneExpert(FeedForwardContract):
    component = MixtureOfExperts(n_experts=1, top_k=1, d_ff=8, norm_topk=False)


def built(**options: Any) -> nn.Module:
    """A layer of width 32 whose weights are large, and whose bias for the choice is anything in [-0.5, 0.5]."""
    layer = shaken(fresh(MixtureOfExperts(**{"d_ff": 12, **options}).build, layer_spec()))
    bias_E = layer.gate.e_score_correction_bias
    if bias_E is not None:
        bias_E += torch.rand(len(bias_E), generator=torch.Generator().manual_seed(1)) - 0.5
    return layer


# ------------------------------------------------------------------------------------------------- the equation


def by_hand(layer: nn.Module, options: dict[str, Any], x_D: torch.Tensor) -> torch.Tensor:
    """One token, written down with Python's own sorting."""
    given = MixtureOfExperts(**options)
    logits = layer.gate.weight @ x_D
    score = torch.exp(logits) / torch.exp(logits).sum() if given.router == "softmax" else 1 / (1 + torch.exp(-logits))
    bias = layer.gate.e_score_correction_bias
    choice = dict(enumerate((score if bias is None else score + bias).tolist()))
    size = given.n_experts // given.n_groups
    groups = [list(range(start, start + size)) for start in range(0, given.n_experts, size)]
    best = sorted(groups, key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in best[: given.top_groups] for e in group]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: given.top_k]
    total = sum(score[e] for e in chosen) if given.norm_topk else 1.0
    y_D = torch.zeros_like(x_D)
    for e in chosen:
        gate, up = layer.experts.gate_proj[e] @ x_D, layer.experts.up_proj[e] @ x_D
        hidden = gate / (1 + torch.exp(-gate)) * up
        y_D = y_D + given.routed_scale * score[e] / total * (layer.experts.down_proj[e] @ hidden)
    return y_D if layer.shared_experts is None else y_D + layer.shared_experts(x_D, None)


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    n_groups = draw(st.integers(1, 3))
    size = draw(st.integers(1 if n_groups == 1 else 2, 4))
    top_groups = draw(st.integers(1, n_groups))
    top_k = draw(st.integers(1, top_groups * size))
    return {
        "n_experts": n_groups * size,
        "n_groups": n_groups,
        "top_groups": top_groups,
        "top_k": top_k,
        "router": draw(st.sampled_from(["softmax", "sigmoid"])),
        "norm_topk": draw(st.booleans()) and top_k > 1,
        "routed_scale": draw(st.sampled_from([1.0, 2.5])),
        "n_shared": draw(st.integers(0, 2)),
        "bias_update": draw(st.sampled_from([0.0, 0.1])),
        "d_ff": draw(st.sampled_from([8, 5])),
    }


@settings(max_examples=60, deadline=None)
@given(options=mixtures(), rows=st.integers(0, 3), tokens=st.integers(1, 7), seed=st.integers(0, 10))
def test_it_is_its_equation(options: dict[str, Any], rows: int, tokens: int, seed: int) -> None:
    layer, x_BTD = built(**options).double(), noise(rows, tokens, 32, seed=seed).double()
    expected = [by_hand(layer, options, x_D) for x_D in x_BTD.flatten(0, 1)]
    y_BTD = layer(x_BTD, context(rows or 1, tokens))
    assert y_BTD.shape == x_BTD.shape
    if expected:
        torch.testing.assert_close(y_BTD.flatten(0, 1), torch.stack(expected))
    y_BTD.sum().backward()  # no token at all must not break a step either
    assert all(parameter.grad.isfinite().all() for parameter in layer.experts.parameters())


def test_an_expert_that_a_negative_score_leaves_below_zero_is_not_lost_to_one_of_another_group() -> None:
    """The masked groups count as -inf; with 0 in their place they would win over scores + bias below 0."""
    layer = built(n_experts=6, n_groups=3, top_groups=1, top_k=2, router="sigmoid")
    layer.gate.e_score_correction_bias.copy_(torch.tensor([-3.0, -3.0, -2.0, -2.0, -4.0, -4.0]))
    routing = layer.gate.choose(layer.gate(noise(50, 32)))
    assert set(routing.experts_NK.flatten().tolist()) == {2, 3}


def test_the_bias_changes_the_choice_and_not_the_weights() -> None:
    layer, x_ND = built(n_experts=6, top_k=2, router="sigmoid", norm_topk=False), noise(50, 32)
    layer.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0]))
    routing = layer.gate.choose(layer.gate(x_ND))
    assert set(routing.experts_NK.flatten().tolist()) == {0, 1}
    assert torch.equal(routing.weights_NK, routing.logits_NE.sigmoid().gather(1, routing.experts_NK))


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_the_router_computes_in_fp32(precision: str) -> None:
    layer, x_ND = built(n_experts=64, top_k=2), noise(200, 32).bfloat16()
    if precision == "weights":
        layer.gate.bfloat16()
    expected = x_ND.double() @ layer.gate.weight.double().T
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        actual = layer.gate(x_ND)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)  # bf16 products would be 1e-2 off


# -------------------------------------------------------------------------------------------- grouped products


@pytest.fixture(params=["grouped_mm", "padded"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the product; an older torch knows the second alone."""
    if request.param == "grouped_mm" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    if request.param == "padded":
        monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "out"), [(16, 24), (6, 5)])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_a_grouped_product_is_one_product_for_each_group(
    way: str, dtype: torch.dtype, width: int, out: int, counts: list[int]
) -> None:
    x_NK = noise(sum(counts), width).to(dtype).requires_grad_()
    w_EMK = noise(4, out, width, seed=1).to(dtype).requires_grad_()
    y_NM = grouped_linear(x_NK, w_EMK, torch.tensor(counts).cumsum(0).int())
    expected_NM = torch.cat([x @ w.T for x, w in zip(x_NK.split(counts), w_EMK, strict=True)])
    g_NM = noise(*y_NM.shape, seed=2).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # sums in another order; bf16 rounds to 2^-8
    assert_close(y_NM, expected_NM, tolerance)
    for ours, theirs in zip(
        torch.autograd.grad(y_NM, (x_NK, w_EMK), g_NM),
        torch.autograd.grad(expected_NM, (x_NK, w_EMK), g_NM),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert_close(ours, theirs, tolerance)


def test_the_log_says_once_which_way_is_used(caplog: pytest.LogCaptureFixture) -> None:
    grouped._say.cache_clear()
    with caplog.at_level("INFO"):
        for d_ff in (8, 8, 6, 6):
            built(n_experts=4, d_ff=d_ff)(noise(1, 5, 32), context(1, 5))
    fast = ["experts: torch's grouped_mm in torch.float32 on cpu"] if hasattr(torch.nn.functional, "grouped_mm") else []
    assert [record.message for record in caplog.records][: len(fast)] == fast
    assert len([record for record in caplog.records if "padded batches" in record.message]) == 1


def test_a_training_step_compiles_in_one_graph() -> None:
    options = {"n_experts": 8, "aux_loss": 0.1, "bias_update": 0.1, **DEEPSEEK}
    ends = []
    for compiled in (False, True):
        layer = built(**options).train()
        torch._dynamo.reset()
        forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        ctx = context(2, 7)
        (forward(noise(2, 7, 32), ctx).square().sum() + ctx.losses["aux_loss"]).backward()
        ends.append([layer.load, *(parameter.grad for parameter in layer.parameters())])
    for eager, traced in zip(*ends, strict=True):
        assert_close(traced.float(), eager.float())


# ------------------------------------------------------------------------------------- padding, loads and losses


def test_padding_changes_nothing_for_others_and_counts_in_no_load_and_no_loss() -> None:
    options = {"n_experts": 6, "aux_loss": 0.5, "z_loss": 0.5}
    x_BTD, counts = noise(2, 9, 32), [9, 4]
    padded, alone = built(**options).train(), built(**options).train()
    ctx = context(2, 9, counts=counts)
    y_BTD = padded(x_BTD, ctx)
    real_ND = torch.cat([row[:length] for row, length in zip(x_BTD, counts, strict=True)])
    own = context(1, 13)
    assert_close(torch.cat((y_BTD[0], y_BTD[1, :4])), alone(real_ND[None], own)[0])
    assert torch.equal(padded.load, alone.load)
    for name in ("aux_loss", "z_loss"):
        assert_close(ctx.losses[name], own.losses[name])


def test_the_balancing_loss_is_top_k_when_even_and_more_otherwise() -> None:
    layer = built(n_experts=4, top_k=2, aux_loss=1.0).train()
    for weight, expected in ((torch.eye(4), 2.0), (torch.tensor([[9.0], [9.0], [0.0], [0.0]]) * torch.ones(4), 4.0)):
        with torch.no_grad():
            layer.gate.weight.zero_()[:, :4] = 20 * weight
        x_BTD = torch.zeros(1, 4, 32)
        x_BTD[0, :, :4] = torch.eye(4) + torch.eye(4).roll(1, 0)  # every expert is wanted by two of the four tokens
        ctx = context(1, 4)
        layer(x_BTD, ctx)
        assert ctx.losses["aux_loss"].item() == pytest.approx(expected, rel=1e-4)


def test_nothing_is_counted_and_no_loss_added_outside_of_training() -> None:
    layer, ctx = built(n_experts=4, aux_loss=1.0, z_loss=1.0), context(1, 5)
    layer.eval()(noise(1, 5, 32), ctx)
    with torch.no_grad():
        layer.train()(noise(1, 5, 32), ctx)
    assert not ctx.losses
    assert not layer.load.any()


def test_a_pass_without_a_valid_token_has_finite_losses() -> None:
    layer, ctx = built(n_experts=4, aux_loss=1.0, z_loss=1.0).train(), context(1, 5, counts=[0])
    layer(noise(1, 5, 32), ctx)
    sum(ctx.losses.values()).backward()
    assert [value.item() for value in ctx.losses.values()] == [0.0, 0.0]
    assert layer.gate.weight.grad.isfinite().all()


def test_the_bias_follows_the_sign_of_what_an_expert_lacks_over_all_processes() -> None:
    layer = built(n_experts=4, bias_update=0.25, router="sigmoid").train()
    before = layer.gate.e_score_correction_bias.clone()
    layer.load.copy_(torch.tensor([1, 0, 3, 2]))
    other = torch.tensor([0, 1, 7, 2])  # of another process: together 1, 1, 10, 4 around a mean of 4
    metrics = layer.after_step(lambda load_E: load_E + other)
    torch.testing.assert_close(layer.gate.e_score_correction_bias - before, torch.tensor([0.25, 0.25, -0.25, 0.0]))
    assert metrics["max_violation"].item() == pytest.approx(10 / 4 - 1)
    assert not layer.load.any()


@pytest.mark.parametrize("reason", ["skipped", "frozen"])
def test_the_bias_stays_after_a_skipped_step_and_where_the_router_is_frozen(reason: str) -> None:
    layer = built(n_experts=4, bias_update=0.25).train().requires_grad_(reason != "frozen")
    before = layer.gate.e_score_correction_bias.clone()
    layer(noise(1, 9, 32).requires_grad_(), context(1, 9))
    layer.after_step(lambda load_E: load_E, skipped=reason == "skipped")
    assert torch.equal(layer.gate.e_score_correction_bias, before)
    assert not layer.load.any()


# ------------------------------------------------------------------------------------------ building and options


def test_names_shapes_and_start_values() -> None:
    layer = fresh(MixtureOfExperts(n_experts=64, d_ff=24, router="sigmoid", n_shared=2).build, layer_spec())
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "gate.weight": (64, 32),
        "gate.e_score_correction_bias": (64,),
        "experts.gate_proj": (64, 24, 32),
        "experts.up_proj": (64, 24, 32),
        "experts.down_proj": (64, 32, 24),
        "shared_experts.gate_proj.weight": (48, 32),
        "shared_experts.up_proj.weight": (48, 32),
        "shared_experts.down_proj.weight": (32, 48),
    }
    for name, factor in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 6**-0.5)):
        # initializer_range 0.3, 3 layers; the deviation of 49,152 numbers is known to 1 / sqrt(2 * 49152) = 0.3 %
        assert getattr(layer.experts, name).std().item() == pytest.approx(0.3 * factor, rel=0.02)
    init_weights(layer, 0.3, 3, width_ratio=4.0, zero_residual=True)
    assert layer.experts.up_proj.std().item() == pytest.approx(0.15, rel=0.02)
    assert not layer.experts.down_proj.any()
    plain = fresh(MixtureOfExperts(n_experts=4, d_ff=24).build, layer_spec())
    assert "gate.e_score_correction_bias" not in plain.state_dict()


def test_the_first_layers_can_be_dense() -> None:
    component = MixtureOfExperts(n_experts=4, d_ff=8, dense_layers=2, d_ff_dense=48)
    dense, sparse = (component.build(layer_spec(layer=layer)) for layer in (1, 2))
    assert dense.down_proj.in_features == 48
    assert sparse.experts.down_proj.shape == (4, 32, 8)


def test_parameters_that_a_token_does_not_pass_are_idle() -> None:
    layer = built(n_experts=8, top_k=3, d_ff=12, n_shared=1)
    assert count.idle_parameters(nn.Sequential(layer, nn.Linear(2, 2))) == 5 * 3 * 32 * 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_experts": 6, "n_groups": 4}, "6 experts do not divide over 4 groups: set n_groups to one of 1, 2, 3, 6"),
        ({"n_groups": 2, "top_groups": 3}, "top_groups 3 is more than n_groups 2: lower it"),
        ({"n_groups": 8}, "8 groups of 8 experts hold one each: set n_groups to 4 or less"),
        ({"n_experts": 3, "n_groups": 3}, "3 groups of 3 experts hold one each: set n_groups to 1 or less"),
        ({"top_k": 9}, "top_k 9 is more than n_experts 8: lower it"),
        ({"n_groups": 4, "top_k": 3}, "top_k 3 is more than the 2 experts of 1 of 4 groups: raise top_groups"),
        (
            {"top_k": 1},
            "top_k 1 with norm_topk makes every weight 1, so the router cannot learn: set norm_topk to false",
        ),
        ({"dense_layers": 1}, "dense_layers 1 needs d_ff_dense"),
        ({"d_ff_dense": 64}, "d_ff_dense 64 is the width of dense layers, but there are none: set dense_layers"),
        ({"router": "sigmoid", "z_loss": 0.1}, "z_loss 0.1 bounds the logits of a softmax"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as error:
        MixtureOfExperts(**options)
    (problem,) = error.value.errors()
    assert words in problem["msg"]
    assert "\n" not in problem["msg"]


def test_experts_that_do_not_divide_over_groups_are_one_line_of_the_command(lab: Any) -> None:
    lab.write(model={"feedforward": {"kind": "moe", "n_experts": 6, "n_groups": 4}})
    told = lab.sky("train", "run.yaml")
    assert told.code == 2
    (line,) = told.errors
    assert "model.feedforward" in line
    assert "6 experts do not divide over 4 groups: set n_groups to one of 1, 2, 3, 6" in line
