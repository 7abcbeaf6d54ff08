"""Activation checkpointing: what is kept, and that no gradient notices."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sky_core.model import recompute
from sky_core.model.language_model import LanguageModel
from sky_core.testing.workbench import tiny_model, tiny_run

VOCAB = 41
POLICIES = ("none", "selective", "block")
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "naive attention": {"kernel": "naive"},
    "mixture": {"feedforward": {"kind": "moe", "n_experts": 4, "top_k": 2, "d_ff": 16, "aux_loss": 0.1}},
    "windows": {"attention": {"kind": "full", "window": 5}, "position": "alibi"},
    "embedding again": {"block": {"kind": "pre", "residual_scalars": True}, "norm": "layernorm"},
}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(0))


def gradients(model: LanguageModel, policy: str, *, bf16: bool = False, passes: int = 1) -> dict[str, torch.Tensor]:
    model.activation_checkpointing = policy  # type: ignore[assignment]
    model.zero_grad()
    torch.manual_seed(3)
    total = torch.zeros(())
    with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
        for number in range(passes):
            collect: dict[str, Any] = {}
            tokens_BT = tokens(2, 16).roll(number)
            total = total + model.nll(model.hidden(tokens_BT, collect=collect), tokens_BT)
            total = total + sum(collect["losses"].values())
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_no_policy_changes_a_bit_of_a_gradient(options: dict[str, Any], bf16: bool, dropout: float) -> None:
    model = tiny_model(VOCAB, dropout=dropout, **options).train()
    plain = gradients(model, "none", bf16=bf16)
    assert len(plain) == len(list(model.parameters()))
    for policy in POLICIES[1:]:
        other = gradients(model, policy, bf16=bf16)
        assert all(torch.equal(other[name], gradient) for name, gradient in plain.items()), policy


def test_two_passes_under_one_autocast_are_recomputed_each_by_itself() -> None:
    """The second finds weights that the first has cast; its recomputation does not."""
    model = tiny_model(VOCAB).train()
    plain = gradients(model, "none", bf16=True, passes=2)
    for policy in POLICIES[1:]:
        for name, gradient in gradients(model, policy, bf16=True, passes=2).items():
            # Through one cast the gradients of two passes are added in bf16 (2⁻⁸), through two in fp32.
            assert (gradient - plain[name]).norm() <= 2**-7 * plain[name].norm(), (policy, name)


def held(model: LanguageModel, policy: str, bf16: bool) -> int:
    """Bytes that a forward pass leaves allocated for its backward pass."""
    model.activation_checkpointing = policy  # type: ignore[assignment]
    context = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched, context:
        hidden_BTD = model.hidden(tokens(4, 64))
    assert hidden_BTD.requires_grad
    return sum(event.self_cpu_memory_usage for event in watched.events())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_block_keeps_less_than_selective_and_that_less_than_all(options: dict[str, Any], bf16: bool) -> None:
    model = tiny_model(VOCAB, n_layer=4, d_model=64, n_head=4, **options).train()
    none, selective, block = (held(model, policy, bf16) for policy in POLICIES)
    assert block < 0.3 * none
    assert 1.5 * block < selective < 0.75 * none


class Counting(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        self.computed[operation._schema.name] += 1
        return operation(*inputs, **(options or {}))


def test_selective_makes_no_product_and_no_attention_twice() -> None:
    model = tiny_model(VOCAB, tie_embeddings=False).train()

    def count(policy: str) -> Counter[str]:
        with Counting() as counting:
            gradients(model, policy)
        return counting.computed

    none, selective, block = (count(policy) for policy in POLICIES)
    assert {selective[name] - none[name] for name in recompute.KEPT} == {0}
    assert selective["aten::silu"] == 2 * none["aten::silu"] > 0
    assert block["aten::mm"] > none["aten::mm"] > 0


@pytest.mark.parametrize(("given", "policy"), [(True, "block"), (False, "none"), *((name, name) for name in POLICIES)])
def test_run_files_may_say_true_or_false(given: Any, policy: str) -> None:
    train = {"steps": 1, "batch_tokens": 64, "activation_checkpointing": given}
    assert tiny_run(train=train).train.activation_checkpointing == policy
