"""Mixtures of experts in a run: balancing without a loss, what counts as a load, resuming, Muon, FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sky_core.components.moe import MixtureOfExperts as MixtureOfExpertsOptions
from sky_core.model.init import init_weights
from sky_core.model.moe import MixtureOfExperts
from sky_core.run_directory import RunDirectory
from sky_core.testing.workbench import TINY, assert_close, context, layer_spec, tiny_model, tiny_run
from sky_core.training.trainer import Trainer

MOE = {"kind": "moe", "n_experts": 8, "top_k": 2, "d_ff": 8, "router": "sigmoid", "n_shared": 1, "bias_update": 0.02}


def built(feedforward: dict[str, Any] = MOE, **fit: Any) -> Trainer:
    train = {"steps": 1, "batch_tokens": 128, "precision": "fp32", "dry_run": False, **fit}
    run = tiny_run(out="runs", model={**TINY, "feedforward": feedforward}, train=train, log={"every": 1})
    return run.train.build(run, RunDirectory.create(run, config_input=""))  # type: ignore[no-any-return]


def mixtures(trainer: Trainer) -> list[MixtureOfExperts]:
    return [module for module in trainer.model.modules() if isinstance(module, MixtureOfExperts)]


def biases(trainer: Trainer) -> list[list[float]]:
    return [layer.gate.e_score_correction_bias.tolist() for layer in mixtures(trainer)]


def violations(lab: Any, trainer: Trainer) -> list[float]:
    return [line["max_violation"] for line in lab.metrics(trainer.directory.path) if "max_violation" in line]


BALANCING = {
    "bias": {"bias_update": 0.01},
    "loss": {"aux_loss": 0.5},
    "nothing": {},
}


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balancing", BALANCING)
def test_experts_that_start_skewed_even_out_by_a_bias_or_a_loss_and_not_by_themselves(
    balancing: str, router: str
) -> None:
    component = MixtureOfExpertsOptions(d_ff=8, router=router, **BALANCING[balancing])
    layer = component.build(layer_spec(initializer_range=0.1))
    torch.manual_seed(0)
    init_weights(layer, 0.1, 3)
    with torch.no_grad():
        layer.gate.weight[:2] += 0.1  # two experts look for what all tokens below share
    optimizer = torch.optim.AdamW(layer.train().parameters(), lr=1e-3)
    target_DD = torch.randn(32, 32) / 6
    seen = []
    for _ in range(120):
        x_BTD, ctx = 1 + torch.randn(4, 32, 32), context(4, 32)
        error = (layer(x_BTD, ctx) - (x_BTD @ target_DD).tanh()).square().mean()
        (error + sum(ctx.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(layer.after_step(lambda load_E: load_E)["max_violation"].item())
    # At the start two of eight experts have nearly all of it, four times the mean.
    assert seen[0] > 2.5
    end = sum(seen[-10:]) / 10
    assert end > 2.5 if balancing == "nothing" else end < 1.0


def test_the_balancing_loss_is_part_of_the_loss_and_logged(lab: Any) -> None:
    trainer = built({**MOE, "aux_loss": 0.5, "bias_update": 0.0})
    trainer.train()
    (line,) = [line for line in lab.metrics(trainer.directory.path) if "loss" in line]
    assert line["aux_loss"] > 0.5 * 2  # two layers, at least 0.5 top_k each
    assert line["loss"] == pytest.approx(line["nll"] + line["aux_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "fit",
    [
        {"micro_batch": 2},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "block"},
        {"dry_run": True},
    ],
)
def test_accumulation_recomputation_and_the_dry_run_change_no_balance(lab: Any, fit: dict[str, Any]) -> None:
    """Recomputing runs each layer twice and counts twice: neither signs nor ratios of loads notice."""
    plain, other = built(), built(**fit)
    plain.train()
    other.train()
    assert biases(other) == biases(plain)
    assert violations(lab, other) == violations(lab, plain)


def test_a_skipped_step_moves_no_bias_and_leaves_no_load(lab: Any) -> None:
    trainer = built(steps=2, max_skipped=10)
    with torch.no_grad():
        trainer.model.norm.weight[0] = torch.nan
    trainer.train()
    assert trainer.skipped == 2
    assert not any(value for bias in biases(trainer) for value in bias)
    assert not any(layer.load.any() for layer in mixtures(trainer))


@pytest.mark.parametrize("option", ["optimizer={kind: muon, lr: 0.02}", "train.activation_checkpointing=true"])
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(lab: Any, option: str) -> None:
    lab.write(model={"feedforward": MOE})
    straight = lab.train(option).directory
    with lab.during(3, lambda trainer: trainer.request_stop("enough")):
        stopped = lab.train(option)
    resumed = lab.resume(stopped.directory).directory
    assert lab.tensors(resumed) == lab.tensors(straight)
    assert lab.metrics(resumed) == lab.metrics(straight)


def test_a_checkpoint_holds_the_bias_and_no_load(lab: Any) -> None:
    trainer = built()
    trainer.train()
    state = trainer.engine.state()
    assert [name for name in state if "load" in name] == []
    for index, bias in enumerate(biases(trainer)):
        assert any(bias)
        assert state[f"model.layers.{index}.mlp.gate.e_score_correction_bias"].tolist() == bias


def test_muon_takes_experts_and_leaves_nothing_out(lab: Any) -> None:
    run = tiny_run(model={**TINY, "feedforward": MOE}, optimizer={"kind": "muon"})
    named = list(tiny_model(259, feedforward=MOE).named_parameters())
    optimizers = run.optimizer.build(named)
    muon = {id(parameter) for group in optimizers[0].param_groups for parameter in group["params"]}
    assert {name for name, parameter in named if parameter.ndim == 3} <= {n for n, p in named if id(p) in muon}
    members = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(parameter) for _, parameter in named)


def test_the_flops_of_a_token_are_those_of_the_experts_that_it_passes() -> None:
    few, many = (tiny_model(61, feedforward={**MOE, "n_experts": n}) for n in (2, 64))
    routers = 6.0 * 2 * 62 * 16  # two layers, 62 more rows of width 16
    assert many.flops_per_token(64) - few.flops_per_token(64) == routers


def test_decoding_with_a_cache_equals_the_whole_pass() -> None:
    model = tiny_model(61, feedforward=MOE)
    tokens_BT = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2)
    steps = [model(tokens_BT[:, t : t + 1], cache=cache) for t in range(12)]
    assert_close(torch.cat(steps, dim=1), model(tokens_BT))
