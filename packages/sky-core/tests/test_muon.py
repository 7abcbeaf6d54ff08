"""Muon: against torch.optim.Muon, and the iteration against the singular value decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sky_core.training import muon
from sky_core.training.groups import is_hidden_matrix
from sky_core.training.muon import Muon, coefficients, orthogonalize, update_scale

SHAPES = [(16, 16), (48, 16), (16, 48), (16, 16), (12, 20)]


def matrices(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for parameter, gradient in zip(own, matrices(100 + step), strict=True):
            parameter.grad = gradient
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no torch.optim.Muon")
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_equals_torchs(scale: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "iteration_dtype", lambda device: torch.bfloat16)  # as torch's, whatever the hardware
    ours, theirs = ([nn.Parameter(m) for m in matrices()] for _ in range(2))
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    run(Muon(ours, **options, scale=scale), ours, 5)
    run(torch.optim.Muon(theirs, **options, adjust_lr_fn=scale), theirs, 5)
    for mine, other, start in zip(ours, theirs, matrices(), strict=True):
        # The arithmetic is the same up to the order of sums in bf16 products (2^-8 relative), so what may differ is a
        # percent of what was moved; a wrong transpose, scale or momentum differs by as much as was moved.
        assert (mine - other).norm() <= 0.02 * (other - start).norm()


@pytest.mark.parametrize(("iteration", "low", "high"), [("newton_schulz", 0.6, 1.3), ("polar_express", 0.8, 1.2)])
def test_the_iteration_keeps_singular_vectors_and_brings_singular_values_to_one(
    iteration: str, low: float, high: float
) -> None:
    steps = 5
    for matrix, x in zip(
        matrices(), orthogonalize(matrices(), coefficients(iteration, steps), torch.float32), strict=True
    ):
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.mT @ x @ vh.mT
        assert x.shape == matrix.shape
        assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-3
        large = sigma / sigma.norm() > 0.02  # smaller ones need more than five iterations
        assert low < inside.diagonal()[large].min()
        assert inside.diagonal().max() < high


def test_polar_express_converges_to_the_polar_factor() -> None:
    for matrix, x in zip(
        matrices(), orthogonalize(matrices(), coefficients("polar_express", 14), torch.float64), strict=True
    ):
        u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        torch.testing.assert_close(x, u @ vh, rtol=0, atol=1e-6)


@pytest.mark.parametrize("iteration", ["newton_schulz", "polar_express"])
def test_a_rank_one_and_a_zero_matrix_stay_finite_in_bf16(iteration: str) -> None:
    one, zero = orthogonalize([torch.ones(32, 64), torch.zeros(32, 64)], coefficients(iteration, 8), torch.bfloat16)
    assert 0.5 < torch.linalg.matrix_norm(one.float(), 2) < 1.5
    assert not zero.any()


def test_matrices_stacked_with_others_come_out_as_they_do_alone() -> None:
    triples = coefficients("newton_schulz", 5)
    together = orthogonalize(matrices(), triples, torch.float32)
    for matrix, x in zip(matrices(), together, strict=True):
        # fp32: a batched product may sum in another order.
        torch.testing.assert_close(x, orthogonalize([matrix], triples, torch.float32)[0], rtol=1e-4, atol=1e-5)


def test_the_same_updates_twice_are_the_same_bits() -> None:
    ends = []
    for _ in range(2):
        own = [nn.Parameter(m) for m in matrices()]
        run(Muon(own), own, 4)
        ends.append(own)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_the_size_of_the_gradient_does_not_matter(factor: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start, gradient = torch.randn(2, 6, 10, generator=generator)
    moved = []
    for scaled in (gradient, factor * gradient):
        own = nn.Parameter(start.clone())
        own.grad = scaled
        Muon([own], lr=0.1, weight_decay=0.0).step()
        moved.append(own.detach() - start)
    # Same direction and size up to bf16 (2^-8) amplified by the iteration's slope of about 3.4 at small values.
    assert (moved[0] - moved[1]).norm() < 0.15 * moved[0].norm()


def test_matching_adamw_means_an_update_rms_of_a_fifth_of_the_learning_rate() -> None:
    for rows, columns in SHAPES:
        semi_orthogonal_rms = math.sqrt(min(rows, columns) / (rows * columns))
        assert update_scale((rows, columns), "match_rms_adamw") * semi_orthogonal_rms == pytest.approx(0.2)
    assert update_scale((48, 12), "original") == 2.0
    assert update_scale((12, 48), "original") == 1.0


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(5, 24, 12), (5, 12, 24), (5, 12, 12), (1, 12, 24)])
def test_experts_are_stepped_as_matrices_each_by_itself(shape: tuple[int, ...], scale: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, *shape, generator=generator)
    beside = nn.Parameter(torch.randn(12, 24, generator=generator))  # of the same shape: iterated in the same stack
    stack, alone = nn.Parameter(start.clone()), [nn.Parameter(matrix.clone()) for matrix in start]
    optimizers = [Muon([stack, beside], scale=scale), Muon(alone, scale=scale)]
    for gradient in gradients:
        stack.grad, beside.grad = gradient, torch.ones_like(beside)
        for own, matrix in zip(alone, gradient, strict=True):
            own.grad = matrix
        for optimizer in optimizers:
            optimizer.step()
    moved, expected = stack - start, torch.stack([own.detach() for own in alone]) - start
    # A batched product may sum in another order: where the iteration is in bf16 that is a percent of what was moved.
    assert (moved - expected).norm() <= 0.02 * expected.norm()


def test_hidden_matrices_are_those_of_experts_and_no_other_stack() -> None:
    assert is_hidden_matrix("model.layers.0.mlp.experts.down_proj", torch.zeros(4, 8, 6))
    assert not is_hidden_matrix("model.layers.0.conv.weight", torch.zeros(4, 1, 3))
    assert not is_hidden_matrix("model.layers.0.mlp.experts.bias", torch.zeros(4))


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes matrices, got a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])
