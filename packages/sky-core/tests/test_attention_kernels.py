"""Every kernel computes softmax(scale QKᵀ)V under every mask, held to the equation in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sky_core.components.attention import Auto
from sky_core.errors import UserError
from sky_core.model.kernels import attention_weights, auto, choose, naive, sdpa
from sky_core.model.mask import Mask

KERNELS = pytest.mark.parametrize("kernel", [naive, sdpa])
SCALE = 0.7


def equation(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, softcap: float | None = None
) -> torch.Tensor:
    """Head by head in float64; a query that sees nothing gives 0."""
    heads, groups = q.shape[1], k.shape[1]
    allowed = mask.dense(q.shape[2], k.shape[2]).expand(len(q), 1, -1, -1)[:, 0]
    bias, outputs = mask.bias(q.shape[2], k.shape[2]), []
    for head in range(heads):
        group = head // (heads // groups)
        scores = SCALE * q[:, head].double() @ k[:, group].double().transpose(1, 2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[:, head]
        weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
        outputs.append(weights @ v[:, group].double())
    return torch.stack(outputs, dim=1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Mask]:
    """q, k, v and a mask; grouped heads, unequal lengths, v of another width, rows with nothing to see."""
    batch, groups, repeats = 2, draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    queries, front = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    shape = draw(st.sampled_from(["plain", "ragged", "documents"]))
    earlier = 0 if shape == "documents" else draw(st.integers(0, 5))
    total = queries + earlier
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    starts = torch.randint(0, earlier + 1, (batch, 1), generator=generator)
    prefix = draw(st.booleans())
    mask = Mask(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 8)),
        prefix_B=torch.randint(0, total + 1, (batch,), generator=generator) if prefix else None,
        documents_BS=torch.randint(0, 2, (batch, total), generator=generator).cumsum(1)
        if shape == "documents"
        else None,
        # A slot before the first key: that query sees nothing.
        slots_BT=starts + torch.arange(queries) - draw(st.integers(0, 1)) if shape == "ragged" else None,
        front=front,
        slopes_H=torch.rand(groups * repeats, generator=generator) if draw(st.booleans()) else None,
    )
    keys = total + front
    width = draw(st.sampled_from([4, 8]))
    q = torch.randn(batch, groups * repeats, queries, 8, generator=generator)
    k = torch.randn(batch, groups, keys, 8, generator=generator)
    v = torch.randn(batch, groups, keys, width, generator=generator)
    return q, k, v, mask


@KERNELS
@settings(deadline=None)  # the first call pays for torch
@given(case=cases())
def test_a_kernel_equals_the_equation(kernel: Callable[..., torch.Tensor], case) -> None:
    q, k, v, mask = case
    # Sums of at most 14 terms of size 1 in fp32: a few roundings of 1e-7.
    torch.testing.assert_close(kernel(q, k, v, mask, scale=SCALE).double(), equation(q, k, v, mask), rtol=0, atol=3e-6)


@KERNELS
@settings(deadline=None)  # the first call pays for torch
@given(case=cases())
def test_gradients_equal_those_of_the_equation(kernel: Callable[..., torch.Tensor], case) -> None:
    *tensors, mask = case
    tensors = [tensor.requires_grad_() for tensor in tensors]
    direction = torch.randn_like(kernel(*tensors, mask, scale=SCALE))
    actual = torch.autograd.grad((kernel(*tensors, mask, scale=SCALE) * direction).sum(), tensors)
    allowed = mask.dense(tensors[0].shape[2], tensors[1].shape[2])
    if allowed.any(-1).all():  # where rows see nothing the equation is 0 / 0: finite is all that can be asked
        expected = torch.autograd.grad((equation(*tensors, mask) * direction).sum(), tensors)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert all(gradient.isfinite().all() for gradient in actual)


@pytest.mark.parametrize("kernel", [naive, auto])
@settings(deadline=None, max_examples=40)
@given(case=cases(), softcap=st.sampled_from([0.5, 50.0]))
def test_capped_scores_equal_the_equation(kernel: Callable[..., torch.Tensor], case, softcap: float) -> None:
    q, k, v, mask = case
    actual = kernel(q, k, v, mask, scale=SCALE, softcap=softcap).double()
    torch.testing.assert_close(actual, equation(q, k, v, mask, softcap), rtol=0, atol=5e-6)


def test_sdpa_says_that_it_cannot_cap_scores() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    with pytest.raises(UserError, match=r"sdpa cannot cap scores .*use kernel: naive or auto"):
        sdpa(q, k, v, Mask(), scale=SCALE, softcap=50.0)


def test_auto_is_sdpa_until_scores_are_capped() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    assert torch.equal(auto(q, k, v, Mask(), scale=SCALE), sdpa(q, k, v, Mask(), scale=SCALE))
    capped = auto(q, k, v, Mask(), scale=SCALE, softcap=0.5)
    assert torch.equal(capped, naive(q, k, v, Mask(), scale=SCALE, softcap=0.5))
    assert "flash_attention" in names_of_calls(lambda: auto(q, k, v, Mask(), scale=SCALE))


@KERNELS
def test_slopes_are_not_rounded_with_the_inputs(kernel: Callable[..., torch.Tensor]) -> None:
    """bf16 has 8 bits: 600 and 599 would be one number."""
    mask = Mask(slopes_H=torch.tensor([1.0]), slots_BT=torch.tensor([[600]]), keys_BS=torch.tensor([[0, 1]]))
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8), torch.eye(2)[None, None]
    y = kernel(*(x.bfloat16() for x in (q, k, v)), mask, scale=SCALE).float()
    torch.testing.assert_close(y.flatten(), torch.tensor([1.0, math.e]) / (1 + math.e), rtol=0, atol=0.01)


@KERNELS
def test_a_query_that_sees_nothing_gives_zero(kernel: Callable[..., torch.Tensor]) -> None:
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    mask = Mask(slots_BT=torch.tensor([[-1, 0, 1]]))
    y_BHTE = kernel(q, k, v, mask, scale=SCALE)
    assert not y_BHTE[:, :, 0].any()
    assert y_BHTE[:, :, 1:].all()


def test_attention_weights_are_distributions_over_what_is_visible() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    a_BHTS = attention_weights(q, k, Mask(), scale=SCALE)
    torch.testing.assert_close(a_BHTS.sum(-1), torch.ones(2, 4, 5))
    assert not a_BHTS.triu(1).any()


@KERNELS
def test_dropout_keeps_the_mean(kernel: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    draws = torch.stack([kernel(q, k, v, Mask(), scale=SCALE, dropout=0.3) for _ in range(1000)])
    assert draws.std(0).max() > 0.1
    # The mean of 1000 draws with a standard deviation of about 1 is known to 1/sqrt(1000) = 0.03.
    torch.testing.assert_close(draws.mean(0), kernel(q, k, v, Mask(), scale=SCALE), rtol=0, atol=0.15)


class Calls(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def names_of_calls(function: Callable[[], object]) -> str:
    with Calls() as calls:
        function()
    return " ".join(calls.names)


def test_layers_share_one_lowered_mask() -> None:
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    for slopes_H in (None, torch.tensor([0.5, 0.25])):
        mask = Mask(documents_BS=torch.tensor([[0, 0, 1, 1]]), slopes_H=slopes_H)
        assert "masked_fill" in names_of_calls(lambda mask=mask: sdpa(q, k, v, mask, scale=SCALE))
        assert "masked_fill" not in names_of_calls(lambda mask=mask: sdpa(q, k, v, mask, scale=SCALE))


def test_decoding_one_token_with_sdpa_makes_no_mask() -> None:
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    for mask in (Mask(), Mask(window=3), Mask(causal=False)):
        called = names_of_calls(lambda mask=mask: sdpa(q, k, v, mask, scale=SCALE))
        assert "arange" not in called
        assert "repeat" not in called


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_sdpa_takes_the_fused_path(dropout: float) -> None:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    called = names_of_calls(lambda: sdpa(q, k, v, Mask(), scale=SCALE, dropout=dropout))
    # torch 2.13 has no fused attention with dropout on the CPU and computes the weights instead.
    assert ("flash_attention" in called) == (dropout == 0.0)


SHORT_OR_NOT = [(256, True, True), (257, True, False), (256, False, False)]


@pytest.mark.parametrize(("length", "in_training", "wide"), SHORT_OR_NOT)
def test_sdpa_trains_short_bf16_sequences_in_fp32(length: int, in_training: bool, wide: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, length, 8).to(torch.bfloat16).requires_grad_(in_training) for h in (4, 2, 2))
    exact = naive(q.double(), k.double(), v.double(), Mask(), scale=SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sdpa(q, k, v, Mask(), scale=SCALE)
    assert y.dtype == torch.bfloat16
    # Computed in fp32, the one rounding is that of the result; in bfloat16 the weights are rounded as well.
    rounded_alike = (y == exact.to(torch.bfloat16)).double().mean()
    assert (rounded_alike > 0.999) == wide
    if in_training:
        upstream = torch.randn_like(y)
        for mine, true in zip(
            torch.autograd.grad(y, (q, k, v), upstream),
            torch.autograd.grad(exact, (q, k, v), upstream.double()),
            strict=True,
        ):
            assert mine.dtype == torch.bfloat16
            torch.testing.assert_close(mine, true, rtol=0.02, atol=0.05)


def test_auto_says_once_what_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    choose.cache_clear()
    with caplog.at_level("INFO", logger="sky_core"):
        assert Auto().build() is Auto().build() is auto
    assert caplog.messages == [
        "attention kernel auto: sdpa (torch.nn.functional.scaled_dot_product_attention; in training on a CPU, unless an"
        " operator of our own takes its place, up to 256 tokens in fp32), naive for capped scores"
    ]
