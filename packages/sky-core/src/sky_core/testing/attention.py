"""The contract of an attention layer: causal, cached, ragged, packed, prefixed, adaptable, compilable.

B batch, T time, D model width, P prefix length, G key/value heads, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from sky_core.errors import UserError
from sky_core.model.mask import Mask
from sky_core.slots import Attention
from sky_core.testing.component import ComponentContract
from sky_core.testing.workbench import (
    Feed,
    assert_close,
    assert_compiles,
    assert_every_parameter_learns,
    attention_spec,
    component,
    context,
    dense_kernel,
    fresh,
    noise,
    shaken,
)


class AttentionContract(ComponentContract):
    """An attention layer. What is switched off below must be refused with a `UserError`, never ignored."""

    base = Attention
    softmax: ClassVar[bool] = True
    """Computes softmax(QKᵀ)V over what is visible with `q_proj k_proj v_proj o_proj` (compared with that equation)."""
    position: ClassVar[str] = "rope"
    """Position encoding that the layer is tested with."""
    projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the linears that adapters may target."""
    documents: ClassVar[bool] = True
    """Keeps the documents of a packed row apart."""
    ragged: ClassVar[bool] = True
    """Decodes rows of different lengths in one batch."""
    prefixes: ClassVar[bool] = True
    """Lets every query see the key/value pairs of `ctx.prefixes` (the tap of prefix tuning)."""
    prefix_shape: ClassVar[tuple[int, int, int] | None] = None
    """Heads, key width and value width of such pairs; None: those of the `AttentionSpec`."""
    prefix_lm: ClassVar[bool] = True
    """Lets the first `prefix_B` tokens of a row see each other."""
    spec: ClassVar[dict[str, Any]] = {}
    """Fields of the `AttentionSpec` to test with (default: width 32, 4 heads of 8 over 2 key/value heads, bias)."""
    tolerance: ClassVar[float] = 1e-5
    """Largest difference, relative to the largest output, between two orders of the same fp32 computation."""

    def layer(self, **changes: Any) -> nn.Module:
        """The layer under test with random weights, in evaluation mode."""
        changes = self.spec | changes
        head_dim = changes.get("head_dim", 8)
        position = component("position", changes.pop("position", self.position)).build(32, head_dim, 32, 4)
        return shaken(fresh(self.component.build, attention_spec(position.in_layers(), **changes)))

    @staticmethod
    def visible(t: int, s: int) -> bool:
        """Whether query t sees key s of one causal row."""
        return s <= t

    def close(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert_close(actual, expected, self.tolerance)

    def test_the_output_has_the_shape_of_the_input(self) -> None:
        x_BTD = noise(2, 7, 32)
        assert Feed(self.layer(), 2, cached=False)(x_BTD).shape == x_BTD.shape

    def test_projections_have_their_names(self) -> None:
        names = {name for name, module in self.layer().named_modules() if isinstance(module, nn.Linear)}
        assert names == set(self.projections)

    def test_each_query_sees_what_is_visible_and_nothing_else(self) -> None:
        x_BTD = noise(1, 11, 32).requires_grad_()
        y_BTD = Feed(self.layer(), 1, cached=False)(x_BTD)
        for t in range(11):
            (gradient,) = torch.autograd.grad(y_BTD[0, t].sum(), x_BTD, retain_graph=True)
            seen = gradient[0].abs().sum(-1) > 0
            assert seen.tolist() == [self.visible(t, s) for s in range(11)], f"query {t}"

    def test_it_equals_softmax_attention_over_what_is_visible(self) -> None:
        if not self.softmax:
            pytest.skip("softmax = False: not the softmax equation")
        layer, x_BTD = self.layer(position="none"), noise(2, 11, 32)
        q, k, v = (
            getattr(layer, name)(x_BTD).unflatten(-1, (-1, self.spec.get("head_dim", 8))).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        allowed = torch.tensor([[self.visible(t, s) for s in range(11)] for t in range(11)])
        heads = dense_kernel(q, k, v, _Table(allowed_TS=allowed))
        self.close(Feed(layer, 2, cached=False)(x_BTD), layer.o_proj(heads.transpose(1, 2).flatten(-2)))

    def test_future_tokens_do_not_change_the_past(self) -> None:
        feed, x_BTD = Feed(self.layer(), 2, cached=False), noise(2, 11, 32)
        changed = torch.cat([x_BTD[:, :6], noise(2, 5, 32, seed=1)], dim=1)
        self.close(feed(changed)[:, :6], feed(x_BTD)[:, :6])

    @pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 5, 1], [11]], ids=["steps", "chunks", "whole"])
    def test_decoding_in_pieces_equals_the_parallel_forward(self, pieces: list[int]) -> None:
        layer, x_BTD = self.layer(), noise(2, 11, 32)
        feed = Feed(layer, 2)
        decoded = torch.cat([feed(piece) for piece in x_BTD.split(pieces, dim=1)], dim=1)
        self.close(decoded, Feed(layer, 2, cached=False)(x_BTD))

    def test_rows_of_different_lengths_decode_as_if_alone(self) -> None:
        layer, x_BTD, lengths = self.layer(), noise(3, 11, 32), [2, 7, 4]
        if not self.ragged:
            with pytest.raises(UserError):
                self._decode_ragged(layer, x_BTD, lengths)
            return
        decoded = self._decode_ragged(layer, x_BTD, lengths)
        alone = Feed(layer, 3, cached=False)(x_BTD)
        for row, length in enumerate(lengths):
            self.close(decoded[row], alone[row, : length + 4])

    def _decode_ragged(self, layer: nn.Module, x_BTD: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
        """Outputs of each row: its prompt, padded on the right with noise, then 4 tokens one by one."""
        feed, prompts = Feed(layer, len(lengths)), noise(len(lengths), max(lengths), 32, seed=5)
        for row, length in enumerate(lengths):
            prompts[row, :length] = x_BTD[row, :length]
        y_BTD = feed(prompts, counts=lengths)
        outputs = [[y_BTD[row, :length]] for row, length in enumerate(lengths)]
        for step in range(4):
            token = torch.stack([x_BTD[row, length + step, None] for row, length in enumerate(lengths)])
            for row, y_1D in enumerate(feed(token)):
                outputs[row].append(y_1D)
        return [torch.cat(pieces) for pieces in outputs]

    def test_documents_of_a_packed_row_do_not_see_each_other(self) -> None:
        layer, x_BTD = self.layer(position="none"), noise(1, 11, 32)
        documents_BT = torch.tensor([[0] * 4 + [1] * 7])
        feed = Feed(layer, 1, cached=False)
        if not self.documents:
            with pytest.raises(UserError):
                feed(x_BTD, documents_BT=documents_BT)
            return
        packed = feed(x_BTD, documents_BT=documents_BT)
        self.close(packed, torch.cat([feed(x_BTD[:, :4]), feed(x_BTD[:, 4:])], dim=1))

    def test_the_prefix_of_a_row_sees_itself(self) -> None:
        layer, x_BTD, prefix_B = self.layer(), noise(2, 8, 32), torch.tensor([3, 0])
        feed = Feed(layer, 2, cached=False)
        if not self.prefix_lm:
            with pytest.raises(UserError):
                feed(x_BTD, prefix_B=prefix_B)
            return
        changed = x_BTD.clone()
        changed[:, 2] = noise(32, seed=1)
        before, after = feed(x_BTD, prefix_B=prefix_B), feed(changed, prefix_B=prefix_B)
        assert (after[0, 0] - before[0, 0]).abs().max() > 10 * self.tolerance
        self.close(after[1, :2], before[1, :2])

    def _prefix(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        spec = attention_spec(nn.Identity(), **self.spec)
        heads, k_width, v_width = self.prefix_shape or (spec.n_kv_head, spec.head_dim, spec.head_dim)
        k_BGPE, v_BGPE = noise(2, heads, 3, k_width, seed=3), noise(2, heads, 3, v_width, seed=4)
        return k_BGPE.requires_grad_(), v_BGPE.requires_grad_()

    def test_every_query_sees_the_key_value_prefix(self) -> None:
        layer, x_BTD = self.layer(), noise(2, 9, 32)
        keys, values = self._prefix(layer)
        if not self.prefixes:
            with pytest.raises(UserError):
                Feed(layer, 2, cached=False)(x_BTD, prefix=(keys, values))
            return
        y_BTD = Feed(layer, 2, cached=False)(x_BTD, prefix=(keys, values))
        for t in range(9):
            (gradient,) = torch.autograd.grad(y_BTD[:, t].sum(), values, retain_graph=True)
            assert (gradient.abs().sum((1, 3)) > 0).all(), f"query {t} does not see the whole prefix"
        feed = Feed(layer, 2, prefix=(keys, values))
        self.close(torch.cat([feed(piece) for piece in x_BTD.split([5, 1, 3], dim=1)], dim=1), y_BTD)

    def test_every_parameter_gets_a_finite_gradient(self) -> None:
        layer = self.layer()
        assert_every_parameter_learns(layer, Feed(layer, 2, cached=False)(noise(2, 7, 32)).square().sum())

    def test_bf16_autocast_is_finite_and_near(self) -> None:
        feed, x_BTD = Feed(self.layer(), 2, cached=False), noise(2, 7, 32)
        with torch.autocast("cpu", torch.bfloat16):
            low = feed(x_BTD).float()
        assert low.isfinite().all()
        assert_close(low, feed(x_BTD), 0.05)  # bf16 keeps 8 bits: a few roundings of 2^-8 each

    def test_it_compiles_in_one_graph(self) -> None:
        assert_compiles(self.layer(), noise(2, 7, 32), context(2, 7), tolerance=self.tolerance)

    def test_selected_rows_go_on_as_they_were(self) -> None:
        layer, x_BTD = self.layer(), noise(3, 9, 32)
        feed = Feed(layer, 3)
        feed(x_BTD[:, :6])
        rows, expected = [2, 0, 2], Feed(layer, 3, cached=False)(x_BTD)[:, 6:]
        assert feed.cache is not None
        feed.cache = feed.cache.select(rows)
        self.close(feed(x_BTD[rows, 6:]), expected[rows])

    def test_tokens_taken_back_leave_no_trace(self) -> None:
        """What decoding with a draft needs; a state that cannot go back says so."""
        layer, x_BTD = self.layer(), noise(2, 9, 32)
        feed = Feed(layer, 2)
        for piece in (x_BTD[:, :5], noise(2, 3, 32, seed=1)):
            feed(piece)
        assert feed.cache is not None
        lengths = [5, 4] if self.ragged else [5, 5]
        try:
            feed.cache.rollback(lengths)
        except UserError:
            return
        whole = Feed(layer, 2, cached=False)(x_BTD)
        y_BTD = feed(torch.stack([x_BTD[row, length : length + 4] for row, length in enumerate(lengths)]))
        for row, length in enumerate(lengths):
            self.close(y_BTD[row], whole[row, length : length + 4])

    def test_reset_rows_start_afresh_and_others_go_on(self) -> None:
        layer, x_BTD = self.layer(), noise(2, 9, 32)
        feed, whole = Feed(layer, 2), Feed(layer, 2, cached=False)
        feed(x_BTD[:, :5])
        assert feed.cache is not None
        feed.cache.reset([0, 1] if not self.ragged else [0])
        y_BTD = feed(x_BTD[:, 5:])
        self.close(y_BTD[0], whole(x_BTD[:, 5:])[0])
        if self.ragged:
            self.close(y_BTD[1], whole(x_BTD)[1, 5:])

    def test_detached_state_carries_values_and_no_gradient(self) -> None:
        layer, x_BTD = self.layer(), noise(2, 9, 32).requires_grad_()
        feed = Feed(layer, 2)
        feed(x_BTD[:, :5])
        assert feed.cache is not None
        feed.cache.layers = [state and state.detach() for state in feed.cache.layers]
        y_BTD = feed(x_BTD[:, 5:])
        self.close(y_BTD, Feed(layer, 2, cached=False)(x_BTD)[:, 5:])
        (gradient,) = torch.autograd.grad(y_BTD.sum(), x_BTD)
        assert not gradient[:, :5].any(), "the gradient runs through a detached state"

    def test_state_has_the_batch_first_and_names_its_tensors(self) -> None:
        state = self.layer().new_cache(3, 16, torch.device("cpu"), torch.float32)
        assert all(tensor.shape[0] == 3 for tensor in state.tensors().values())
        assert state.replace(state.tensors()).tensors().keys() == state.tensors().keys()


@dataclass(frozen=True)
class _Table(Mask):
    """A mask given as a table of booleans."""

    allowed_TS: torch.Tensor | None = None

    def dense(self, queries: int, keys: int, device: torch.device | str = "cpu") -> torch.Tensor:
        assert self.allowed_TS is not None
        return self.allowed_TS
