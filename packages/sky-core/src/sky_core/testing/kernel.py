"""The contract of a kernel: softmax(QKᵀ)V as `Mask.dense` and `Mask.bias` define it, with gradients, for many masks.

B batch, T queries, S keys, H query heads, G key/value heads, E and F widths of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from sky_core.errors import UserError
from sky_core.model.mask import Mask
from sky_core.slots import Kernel
from sky_core.testing.component import ComponentContract
from sky_core.testing.workbench import assert_close, dense_kernel, noise

SLOPES_H = torch.tensor([0.5, 0.25, 0.1, 0.0])

MASKS: dict[str, tuple[Callable[[], Mask], int, int]] = {
    "causal": (Mask, 9, 9),
    "bidirectional": (lambda: Mask(causal=False), 9, 9),
    "continuation": (Mask, 4, 9),
    "one query": (Mask, 1, 9),
    "window": (lambda: Mask(window=3), 9, 9),
    "one query with a window": (lambda: Mask(window=3), 1, 9),
    "bidirectional window": (lambda: Mask(causal=False, window=3), 9, 9),
    "prefix": (lambda: Mask(prefix_B=torch.tensor([4, 0])), 9, 9),
    "documents": (lambda: Mask(documents_BS=torch.tensor([[0] * 4 + [1] * 5, [0, 1, 1, 2, 2, 2, 2, 2, 2]])), 9, 9),
    "documents without order": (lambda: Mask(causal=False, documents_BS=torch.tensor([[0, 0, 1], [0, 1, 1]])), 3, 3),
    "ragged rows": (lambda: Mask(slots_BT=torch.tensor([[2, 3], [7, 8]])), 2, 9),
    "ragged single queries": (lambda: Mask(slots_BT=torch.tensor([[2], [8]])), 1, 9),
    "ragged rows with a window": (lambda: Mask(window=3, slots_BT=torch.tensor([[2, 3], [7, 8]])), 2, 9),
    "bounded cache": (lambda: Mask(keys_BS=torch.tensor([[-2, -1, 0, 1, 2], [3, 4, 5, 6, 7]])), 2, 5),
    "bounded cache, one query": (lambda: Mask(window=3, keys_BS=torch.tensor([[-2, -1, 0], [5, 6, 7]])), 1, 3),
    "front": (lambda: Mask(front=3), 6, 9),
    "front and window": (lambda: Mask(front=3, window=2), 6, 9),
    "front and one query": (lambda: Mask(front=3), 1, 9),
    "slopes": (lambda: Mask(slopes_H=SLOPES_H), 9, 9),
    "slopes in both directions": (lambda: Mask(causal=False, slopes_H=SLOPES_H), 9, 9),
    "slopes in a continuation": (lambda: Mask(slopes_H=SLOPES_H), 4, 9),
    "slopes, one query": (lambda: Mask(slopes_H=SLOPES_H), 1, 9),
    "slopes, one query with a window": (lambda: Mask(slopes_H=SLOPES_H, window=3), 1, 9),
    "slopes, front and window": (lambda: Mask(slopes_H=SLOPES_H, front=3, window=4), 6, 9),
    "slopes, front and one query": (lambda: Mask(slopes_H=SLOPES_H, front=3), 1, 9),
    "slopes, ragged rows": (lambda: Mask(slopes_H=SLOPES_H, slots_BT=torch.tensor([[2, 3], [7, 8]])), 2, 9),
    "slopes, ragged single queries": (lambda: Mask(slopes_H=SLOPES_H, slots_BT=torch.tensor([[2], [8]])), 1, 9),
    "slopes, bounded cache": (
        lambda: Mask(slopes_H=SLOPES_H, keys_BS=torch.tensor([[-2, -1, 0, 1, 2], [3, 4, 5, 6, 7]])),
        2,
        5,
    ),
}
"""Masks that kernels are swept over, with the numbers of queries and keys (front included)."""


class KernelContract(ComponentContract):
    """A kernel: what `Mask.dense` defines, computed its own way."""

    base = Kernel
    refuses: ClassVar[tuple[str, ...]] = ()
    """Names of `MASKS`, "softcap" or "dropout": what the kernel can't do; it must say so with a `UserError`."""
    dtype: ClassVar[torch.dtype] = torch.float64
    """The most exact dtype that the kernel computes in."""
    tolerance: ClassVar[float] = 1e-12
    """Largest relative difference to the equation in that dtype."""
    device: ClassVar[str] = "cpu"

    def inputs(self, queries: int, keys: int, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q_BHTE, k_BGSE, v_BGSF with B = 2, H = 4, E = F = 16, ready for gradients."""
        shapes = ((2, 4, queries, 16), (2, groups, keys, 16), (2, groups, keys, 16))
        return tuple(
            noise(*shape, seed=i).to(self.device, self.dtype).requires_grad_() for i, shape in enumerate(shapes)
        )

    def mask(self, name: str) -> Mask:
        mask = MASKS[name][0]()
        moved = {key: value.to(self.device) for key, value in vars(mask).items() if isinstance(value, torch.Tensor)}
        return Mask(**{key: moved.get(key, value) for key, value in vars(mask).items() if key != "memo"})

    @pytest.mark.parametrize("groups", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
    @pytest.mark.parametrize("name", MASKS)
    def test_it_equals_the_equation_with_gradients(self, name: str, groups: int) -> None:
        self.assert_equal_to_the_equation(name, groups)

    @pytest.mark.parametrize("name", ["causal", "one query", "window", "slopes"])
    def test_capped_scores_equal_the_equation_with_gradients(self, name: str) -> None:
        self.assert_equal_to_the_equation(name, 2, softcap=0.7)  # scores of size 1: the cap bends them strongly

    def assert_equal_to_the_equation(self, name: str, groups: int, **options: Any) -> None:
        kernel, inputs = self.component.build(), self.inputs(*MASKS[name][1:], groups)
        if name in self.refuses or not set(self.refuses).isdisjoint(options):
            with pytest.raises(UserError):
                kernel(*inputs, self.mask(name), scale=0.3, dropout=0.0, **options)
            return
        actual = kernel(*inputs, self.mask(name), scale=0.3, dropout=0.0, **options)
        expected = dense_kernel(*inputs, self.mask(name), scale=0.3, **options)
        assert_close(actual, expected, self.tolerance)
        direction = noise(*expected.shape, seed=9).to(expected)
        gradients = (torch.autograd.grad(y, inputs, direction) for y in (actual, expected))
        for mine, theirs in zip(*gradients, strict=True):
            assert_close(mine, theirs, self.tolerance)

    def test_bf16_is_near(self) -> None:
        inputs = [x.detach().bfloat16() for x in self.inputs(9, 9)]
        low = self.component.build()(*inputs, Mask(), scale=0.3, dropout=0.0)
        assert low.dtype == torch.bfloat16
        # inputs keep 8 bits; a few roundings of 2^-8 each
        q, k, v = (x.float() for x in inputs)
        assert_close(low.float(), dense_kernel(q, k, v, Mask(), scale=0.3), 0.05)

    def test_bf16_is_near_with_slopes(self) -> None:
        if "slopes" in self.refuses:
            pytest.skip("the kernel has no slopes")
        inputs = [x.detach().bfloat16() for x in self.inputs(9, 9)]
        low = self.component.build()(*inputs, self.mask("slopes"), scale=0.3, dropout=0.0)
        q, k, v = (x.float() for x in inputs)
        assert_close(low.float(), dense_kernel(q, k, v, self.mask("slopes"), scale=0.3), 0.05)

    def test_large_scores_do_not_overflow(self) -> None:
        q, k, v = self.inputs(9, 9)
        assert self.component.build()(q * 100, k * 100, v, Mask(), scale=1.0, dropout=0.0).isfinite().all()

    def test_dropout_keeps_the_mean(self) -> None:
        q, k, _ = (x.detach() for x in self.inputs(64, 64))
        torch.manual_seed(0)
        if "dropout" in self.refuses:
            with pytest.raises(UserError):
                self.component.build()(q, k, torch.ones_like(k), Mask(), scale=0.3, dropout=0.5)
            return
        y = self.component.build()(q, k, torch.ones_like(k), Mask(), scale=0.3, dropout=0.5)
        assert y.std() > 0.05, "nothing was dropped"
        assert abs(y.mean().item() - 1) < 0.05  # 512 rows of 64 weights: the mean's deviation is below 0.01
