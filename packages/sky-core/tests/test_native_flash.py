"""Flash attention in C++ against the equation in float64, its gradient, and where a model takes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sky_core import native
from sky_core.components.model import Decoder
from sky_core.model import kernels
from sky_core.model.decoder import DecoderLM
from sky_core.model.mask import Mask


@pytest.fixture(autouse=True, scope="module")
def operators() -> None:
    if not native.has("avx512_bf16"):
        pytest.skip("this CPU does not multiply bf16 (AVX512_BF16)")
    assert native.load(), "the operators do not compile on this machine"


def equation(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, logsumexp) of heads that share keys, in the dtype given."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = scale * q @ k.transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def drawn(batch: int, heads: int, groups: int, time: int, e: int, f: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(time)
    shapes = [(batch, time, heads, e), (batch, time, groups, e), (batch, time, groups, f)]
    # As the model's projections leave them: (B, T, H, E) seen as (B, H, T, E).
    return [torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for shape in shapes]


SHAPES = [
    (2, 4, 2, 64, 64, 64),
    (1, 4, 1, 130, 32, 48),
    (2, 2, 2, 17, 64, 16),
    (1, 2, 1, 200, 128, 80),
    (3, 2, 1, 5, 16, 16),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_equation(shape: tuple[int, ...], causal: bool) -> None:
    own = [x.requires_grad_() for x in drawn(*shape)]
    exact = [x.detach().double().requires_grad_() for x in own]
    scale = 1.7 / shape[4] ** 0.5
    y, logsum = torch.ops.sky.flash(*own, scale, causal)
    expected, expected_logsum = equation(*exact, scale, causal)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    y.backward(dy)
    expected.backward(dy.double())
    torch.testing.assert_close(logsum.double(), expected_logsum.detach(), rtol=1e-5, atol=1e-5)
    for mine, right in zip((y, *(x.grad for x in own)), (expected, *(x.grad for x in exact)), strict=True):
        assert mine is not None
        assert right is not None
        # Weights, their gradients and results are rounded to bf16, 2^-9 each; a wrong block would be of the size of 1.
        assert (mine.double() - right).norm() < 0.006 * right.norm()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = drawn(1, 1, 1, 70, 32, 32)
    y, _ = torch.ops.sky.flash(q * 40, k * 40, v, 1.0, True)
    expected, _ = equation((q * 40).double(), (k * 40).double(), v.double(), 1.0, True)
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)


def test_the_future_is_never_read() -> None:
    q, k, v = drawn(1, 2, 2, 100, 32, 32)
    y, _ = torch.ops.sky.flash(q, k, v, 0.2, True)
    k[:, :, 70:] = 9.0
    v[:, :, 70:] = 9.0
    changed, _ = torch.ops.sky.flash(q, k, v, 0.2, True)
    assert torch.equal(changed[:, :, :70], y[:, :, :70])
    assert not torch.equal(changed[:, :, 70:], y[:, :, 70:])


def test_the_compiler_knows_it() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(1, 2, 1, 20, 16, 32))
    torch.library.opcheck(torch.ops.sky.flash.default, (q, k, v, 0.3, True))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = drawn(1, 2, 2, 20, 32, 32)
    with pytest.raises(RuntimeError, match="bfloat16"):
        torch.ops.sky.flash(q.float(), k, v, 1.0, True)
    with pytest.raises(RuntimeError, match="multiple of 16"):
        torch.ops.sky.flash(q[..., :24], k[..., :24], v, 1.0, True)
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.sky.flash(q, k[:, :, :10], v, 1.0, True)


CAUSAL = Mask()
SDPA = kernels.WITH_FLASH[kernels.sdpa]
OTHERS = {
    "a window": replace(CAUSAL, window=4),
    "documents": replace(CAUSAL, documents_BS=torch.zeros(1, 20, dtype=torch.long)),
    "a prefix": replace(CAUSAL, prefix_B=torch.tensor([3])),
    "slopes": replace(CAUSAL, slopes_H=torch.tensor([0.1, 0.2])),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, bool]]:
    """What `torch.ops.sky.flash` is asked."""
    found: list[tuple[float, bool]] = []
    flash = torch.ops.sky.flash

    def recorded(*arguments: object) -> object:
        found.append((float(arguments[3]), bool(arguments[4])))  # type: ignore[arg-type]
        return flash(*arguments)

    monkeypatch.setattr(torch.ops.sky, "flash", recorded)
    return found


@pytest.mark.parametrize("mask", [CAUSAL, replace(CAUSAL, causal=False)])
def test_the_kernel_takes_it_for_whole_sequences(mask: Mask, calls: list[tuple[float, bool]]) -> None:
    q, k, v = drawn(1, 2, 1, 20, 16, 16)
    y = SDPA(q, k, v, mask, scale=0.3)
    assert calls == [(0.3, mask.causal)]
    exact = kernels.naive(q.double(), k.double(), v.double(), mask, scale=0.3)
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mask", OTHERS.values(), ids=OTHERS.keys())
def test_the_kernel_leaves_other_masks_to_torch(mask: Mask, calls: list[tuple[float, bool]]) -> None:
    q, k, v = drawn(1, 2, 1, 20, 16, 16)
    SDPA(q, k, v, mask, scale=0.3)
    assert not calls


def test_the_kernel_leaves_other_numbers_widths_and_dropout_to_torch(calls: list[tuple[float, bool]]) -> None:
    q, k, v = drawn(1, 2, 1, 20, 16, 16)
    SDPA(q.float(), k.float(), v.float(), CAUSAL, scale=0.3)
    SDPA(q[..., :8], k[..., :8], v, CAUSAL, scale=0.3)
    SDPA(q[:, :, -1:], k, v, CAUSAL, scale=0.3)
    SDPA(q, k, v, CAUSAL, scale=0.3, dropout=0.1)
    assert not calls
    kernels.WITH_FLASH[kernels.auto](q, k, v, CAUSAL, scale=0.3, softcap=5.0)
    assert not calls


def small_model(**options: Any) -> DecoderLM:
    torch.manual_seed(0)
    return Decoder(n_layer=2, n_head=4, n_kv_head=2, d_model=64, max_length=32, position="rope", **options).build(50)


def gradients(model: DecoderLM) -> dict[str, torch.Tensor]:
    tokens_BT = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        model.nll(model.hidden(tokens_BT[:, :-1]), tokens_BT[:, 1:]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_a_model_takes_it_when_told_to_and_no_other_does(calls: list[tuple[float, bool]]) -> None:
    plain, quick = small_model(), small_model()
    quick.use_operators()
    expected = gradients(plain)
    assert not calls
    found = gradients(quick)
    assert len(calls) == 2
    for name, gradient in expected.items():  # both round to bf16 on the way
        assert (found[name] - gradient).norm() <= 0.02 * gradient.norm(), name


def test_kernels_that_a_user_chose_to_be_another_stay(calls: list[tuple[float, bool]]) -> None:
    model = small_model(kernel="naive")
    model.use_operators()
    gradients(model)
    assert not calls
