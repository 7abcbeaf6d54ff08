"""The chunked loss equals the cross-entropy of all logits, without ever holding them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sky_core.data.dataset import IGNORE
from sky_core.model.loss import cross_entropy_of_head, linear_cross_entropy


def tensors(
    n: int = 20, d: int = 8, v: int = 31, ignored: float = 0.3, dtype: torch.dtype = torch.float32, seed: int = 0
):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, n // 2, d, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(v, (2, n // 2), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < ignored] = IGNORE
    return hidden, weight, targets


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


@settings(deadline=None)  # the first call pays for torch
@given(
    rows=st.integers(1, 25),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 20),
)
def test_loss_and_gradients_equal_those_of_all_logits_for_every_chunk_size(
    rows: int, ignored: float, softcap: float | None, seed: int
) -> None:
    hidden, weight, targets = tensors(ignored=ignored, dtype=torch.float64, seed=seed)
    ours = linear_cross_entropy(hidden, weight, targets, softcap=softcap, chunk_bytes=rows * 4 * len(weight))
    theirs = reference(hidden, weight, targets, softcap)
    torch.testing.assert_close(ours, theirs)
    # A factor: the trainer divides the sum by the tokens of the whole step.
    for actual, expected in zip(
        torch.autograd.grad(0.3 * ours, (hidden, weight)),
        torch.autograd.grad(0.3 * theirs, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_gradients_pass_gradcheck() -> None:
    hidden, weight, targets = tensors(n=6, d=3, v=5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, chunk_bytes=40), (hidden, weight))


def test_only_the_gradients_that_are_wanted_are_made() -> None:
    hidden, weight, targets = tensors()
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    expected = torch.autograd.grad(reference(hidden, weight, targets), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_the_logits_of_all_tokens_are_never_held() -> None:
    n, d, v, rows = 64, 8, 97, 16
    hidden, weight, targets = tensors(n, d, v)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets, chunk_bytes=rows * 4 * v).backward()
    assert largest.numel == rows * v  # and therefore not n * v


def test_a_small_vocabulary_is_one_chunk() -> None:
    hidden, weight, targets = tensors(n=768, d=128, v=65)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets)
    assert largest.numel == 768 * 128  # one gradient of hidden; the logits 768 * 65 are smaller


def test_a_fully_ignored_batch_gives_zero_and_finite_gradients() -> None:
    hidden, weight, targets = tensors(ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_an_empty_batch_gives_zero() -> None:
    hidden, weight, targets = tensors(n=0)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert not weight.grad.any()


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, targets = tensors()
    loss = linear_cross_entropy(hidden * 1e4, weight, targets)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


def test_under_bf16_autocast_gradients_are_fp32_and_near() -> None:
    hidden, weight, targets = tensors(n=64, d=32, v=50)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_bytes=16 * 4 * 50)
    expected = reference(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)  # logits carry 8 bits: 0.4% each
    for actual, exact in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert actual.dtype == torch.float32
        assert (actual - exact).norm() < 0.03 * exact.norm()


def test_a_head_that_is_more_than_a_weight_gives_the_same_loss_in_chunks() -> None:
    hidden, weight, targets = tensors(n=64, v=97)
    head = nn.Linear(8, 97, bias=False)
    head.weight = nn.Parameter(weight.detach().clone())
    with Largest() as largest:
        loss = cross_entropy_of_head(head, 97, hidden, targets, chunk_bytes=16 * 4 * 97)
        gradients = torch.autograd.grad(loss, (hidden, head.weight))
    expected = reference(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    for actual, exact in zip(gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-4)
    assert largest.numel == 16 * 97
