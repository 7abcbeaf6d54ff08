"""The contracts of a layer's parts: norms, positions, feed-forward layers and the residual wiring of a block.

B batch, T time (tokens), D model width, H heads, S keys, E width of a head.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn

from sky_core.model.context import Context
from sky_core.model.mask import Mask
from sky_core.slots import Block, FeedForward, Norm, Position
from sky_core.testing.component import ComponentContract
from sky_core.testing.workbench import (
    Feed,
    assert_close,
    assert_compiles,
    assert_every_parameter_learns,
    context,
    fresh,
    layer_spec,
    noise,
    shaken,
)


class NormContract(ComponentContract):
    """A normalisation over the last dimension."""

    base = Norm
    centred: ClassVar[bool] = False
    """Takes out the mean."""

    def norm(self, dim: int = 32) -> nn.Module:
        return fresh(self.component.build, dim)

    def test_shape_and_dtype_stay(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            y = self.norm()(noise(2, 3, 32).to(dtype))
            assert y.shape == (2, 3, 32)
            assert y.dtype == dtype

    def test_fresh_outputs_have_unit_size(self) -> None:
        y = self.norm()(5 * noise(64, 32) + 2)
        rms = y.square().mean(-1).sqrt()
        assert_close(rms, torch.ones(64), 1e-3)  # eps is small against inputs of size 5
        if self.centred:
            assert_close(y.mean(-1), torch.zeros(64), 1e-5)

    def test_the_scale_of_the_input_does_not_matter(self) -> None:
        x = 10 * noise(8, 32)
        assert_close(self.norm()(100 * x), self.norm()(x), 1e-4)  # what is left is eps

    def test_vectors_do_not_mix(self) -> None:
        norm, x = shaken(self.norm()), noise(2, 5, 32)
        assert_close(norm(x)[:, 2], norm(x[:, 2]))

    def test_zeros_and_large_values_are_finite(self) -> None:
        for x in (torch.zeros(2, 32), torch.full((2, 32), 1e4), torch.full((2, 32), 300.0).bfloat16()):
            x.requires_grad_()
            y = self.norm()(x)
            y.float().sum().backward()
            assert y.isfinite().all()
            assert x.grad is not None
            assert x.grad.isfinite().all()

    def test_every_parameter_gets_a_finite_gradient(self) -> None:
        norm = shaken(self.norm())
        assert_every_parameter_learns(norm, norm(noise(4, 32).requires_grad_()).square().sum())

    def test_it_compiles_in_one_graph(self) -> None:
        assert_compiles(shaken(self.norm()), noise(2, 3, 32))


class PositionContract(ComponentContract):
    """A position encoding. `acts` says where: at the embedding, inside attention layers, or nowhere."""

    base = Position
    acts: ClassVar[Literal["embedding", "layers", "nowhere"]]
    relative: ClassVar[bool] = True
    """(acts in layers) The score of a query and a key depends on their distance alone."""

    def position(self) -> Any:
        return shaken(fresh(self.component.build, 32, 8, 64, 4))

    def at(self, positions_BT: torch.Tensor) -> Context:
        mask = Mask(slots_BT=positions_BT, keys_BS=positions_BT)
        return Context(torch.zeros_like(positions_BT), positions_BT=positions_BT, mask=mask, end=positions_BT.shape[1])

    def scores(self, positions_BT: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Scores of the same query vector and the same key vector, put at every pair of positions."""
        return _Scores(self.position().in_layers())(*self.same_vectors(positions_BT, dtype), self.at(positions_BT))

    def same_vectors(
        self, positions_BT: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q_BHTE and k_BHTE with one vector at every position."""
        tokens = positions_BT.shape[1]
        q_BHTE, k_BHTE = (noise(1, 1, 1, 8, seed=i).to(dtype).expand(2, 1, tokens, 8) for i in (1, 2))
        return q_BHTE, k_BHTE

    def test_embeddings_change_with_the_position_where_it_acts_there(self) -> None:
        x_BTD = noise(1, 1, 32).expand(2, 6, 32)
        y_BTD = self.position().embed(x_BTD, self.at(torch.arange(6).expand(2, 6)))
        assert y_BTD.shape == x_BTD.shape
        changes = (y_BTD[:, 1:] - y_BTD[:, :-1]).abs().amax() > 1e-3
        assert bool(changes) == (self.acts == "embedding")

    def test_scores_change_with_the_position_where_it_acts_there(self) -> None:
        scores_BHTS = self.scores(torch.arange(6).expand(2, 6))
        changes = (scores_BHTS - scores_BHTS[..., :1, :1]).abs().amax() > 1e-3
        assert bool(changes) == (self.acts == "layers")

    def test_scores_depend_on_the_distance_alone(self) -> None:
        if self.acts != "layers" or not self.relative:
            pytest.skip("it does not act on scores by distance")
        here, there = (self.scores(torch.arange(start, start + 6).expand(2, 6)) for start in (0, 37))
        assert_close(here, there, 1e-4)  # fp32 angles up to 43 radians

    def test_the_layers_hold_no_parameters_of_the_embedding(self) -> None:
        if self.acts == "embedding":
            assert not list(self.position().in_layers().parameters())

    def test_each_row_has_positions_of_its_own(self) -> None:
        positions_BT = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
        x_BTD = noise(1, 1, 32).expand(2, 6, 32)
        y_BTD = self.position().embed(x_BTD, self.at(positions_BT))
        assert torch.equal(y_BTD[1, :3], y_BTD[1, 3:])
        assert torch.equal(y_BTD[0, :3], y_BTD[1, :3])
        scores_BHTS = self.scores(positions_BT)
        assert_close(scores_BHTS[1, :, :3, :3], scores_BHTS[1, :, 3:, 3:])
        assert_close(scores_BHTS[0, :, :3, :3], scores_BHTS[1, :, :3, :3])

    def test_shared_positions_equal_positions_by_row(self) -> None:
        position, x_BTD = self.position(), noise(2, 6, 32)
        one, two = self.at(torch.arange(6)[None]), self.at(torch.arange(6).expand(2, 6))
        assert torch.equal(position.embed(x_BTD, one), position.embed(x_BTD, two))
        assert torch.equal(self.scores(one.positions_BT), self.scores(two.positions_BT))

    def test_tables_made_ahead_change_nothing(self) -> None:
        position, ctx = self.position().in_layers(), self.at(torch.arange(6)[None])
        q_BHTE, k_BHTE = noise(1, 2, 6, 8), noise(1, 1, 6, 8, seed=1)
        lazily = position.rotate(q_BHTE, k_BHTE, self.at(torch.arange(6)[None]))
        position.prepare(ctx)
        for ahead, late in zip(position.rotate(q_BHTE, k_BHTE, ctx), lazily, strict=True):
            assert torch.equal(ahead, late)

    def test_a_token_alone_is_placed_as_in_its_sequence(self) -> None:
        position, (q_BHTE, k_BHTE) = self.position().in_layers(), (noise(2, 4, 6, 8), noise(2, 2, 6, 8, seed=1))
        whole = position.rotate(q_BHTE, k_BHTE, self.at(torch.arange(6)[None]))
        for t in range(6):
            alone = position.rotate(q_BHTE[:, :, [t]], k_BHTE[:, :, [t]], self.at(torch.tensor([[t]])))
            for one, all_of_them in zip(alone, whole, strict=True):
                assert_close(one, all_of_them[:, :, [t]])

    def test_layers_share_what_is_made_of_the_mask(self) -> None:
        position, mask = self.position().in_layers(), Mask()
        assert position.mask(mask) is position.mask(mask)

    def test_a_cast_of_the_model_does_not_move_positions(self) -> None:
        position, positions_BT = self.position().in_layers(), torch.arange(900, 906)[None]
        if list(position.parameters()):
            pytest.skip("its parameters are rounded")
        vectors = self.same_vectors(positions_BT)
        exact = _Scores(position)(*vectors, self.at(positions_BT))
        assert torch.equal(_Scores(position.bfloat16())(*vectors, self.at(positions_BT)), exact)

    def test_the_dtype_stays(self) -> None:
        positions_BT = torch.arange(6)[None]
        rotated = (
            self.position().in_layers().rotate(*self.same_vectors(positions_BT, torch.bfloat16), self.at(positions_BT))
        )
        assert {x_BHTE.dtype for x_BHTE in rotated} == {torch.bfloat16}

    def test_it_compiles_in_one_graph(self) -> None:
        positions_BT = torch.arange(6)[None]
        inputs = (*self.same_vectors(positions_BT), self.at(positions_BT))
        assert_compiles(_Scores(self.position().in_layers()), *inputs)


class _Scores(nn.Module):
    """Products of rotated queries and keys with the bias of the mask: what an attention layer takes a softmax of."""

    def __init__(self, position: Any) -> None:
        super().__init__()
        self.position = position

    def forward(self, q_BHTE: torch.Tensor, k_BHTE: torch.Tensor, ctx: Context) -> torch.Tensor:
        q_BHTE, k_BHTE = self.position.rotate(q_BHTE, k_BHTE, ctx)
        scores_BHTS = q_BHTE @ k_BHTE.mT
        bias_BHTS = self.position.mask(ctx.mask).bias(*scores_BHTS.shape[-2:], scores_BHTS.device)
        return scores_BHTS if bias_BHTS is None else scores_BHTS + bias_BHTS


class FeedForwardContract(ComponentContract):
    """A feed-forward layer."""

    base = FeedForward

    def layer(self) -> nn.Module:
        return shaken(fresh(self.component.build, layer_spec()))

    def test_the_output_has_the_shape_of_the_input(self) -> None:
        assert Feed(self.layer(), 2, cached=False)(noise(2, 7, 32)).shape == (2, 7, 32)

    def test_tokens_do_not_mix(self) -> None:
        layer, x_BTD = self.layer(), noise(2, 7, 32)
        alone = [Feed(layer, 1, cached=False)(x_BTD[row, t][None, None]) for row in range(2) for t in range(7)]
        assert_close(Feed(layer, 2, cached=False)(x_BTD), torch.cat(alone).view(2, 7, 32))

    def test_every_parameter_gets_a_finite_gradient(self) -> None:
        layer = self.layer()
        assert_every_parameter_learns(layer, Feed(layer, 2, cached=False)(noise(2, 7, 32)).square().sum())

    def test_bf16_autocast_is_finite(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert Feed(self.layer(), 2, cached=False)(noise(2, 7, 32)).isfinite().all()

    def test_it_compiles_in_one_graph(self) -> None:
        assert_compiles(self.layer(), noise(2, 7, 32), context(2, 7))

    def test_passes_outside_of_training_leave_no_trace(self) -> None:
        layer = self.layer()
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        Feed(layer.eval(), 2, cached=False)(noise(2, 7, 32))
        with torch.no_grad():
            Feed(layer.train(), 2, cached=False)(noise(2, 7, 32))
        changed = [name for name, buffer in layer.named_buffers() if not torch.equal(buffer, before[name])]
        assert not changed, f"changed: {changed}"

    def test_a_step_of_training_leaves_what_a_checkpoint_holds_and_nothing_else(self) -> None:
        layer = self.layer().train()
        temporary = {name: b.clone() for name, b in layer.named_buffers() if name not in layer.state_dict()}
        Feed(layer, 2, cached=False)(noise(2, 7, 32))
        for module in layer.modules():
            if hasattr(module, "after_step"):
                measured = module.after_step(lambda value: value, skipped=False)
                assert all(value.ndim == 0 and value.isfinite() for value in measured.values())
        left = [name for name, start in temporary.items() if not torch.equal(layer.get_buffer(name), start)]
        assert not left, f"a resumed run would not have {left}: save it, or clear it in after_step"

    def test_extra_losses_are_scalars(self) -> None:
        feed = Feed(self.layer().train(), 2, cached=False)
        feed(noise(2, 7, 32))
        assert all(value.ndim == 0 and value.isfinite() for value in feed.ctx.losses.values())


class _Branch(nn.Module):
    """Stands for attention, feed-forward or memory: a gain times the input; keeps the context it was given."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        self.ctx = ctx
        return self.gain * x_BTD


class BlockContract(ComponentContract):
    """The residual wiring of a layer."""

    base = Block
    normed_stream: ClassVar[bool] = False
    """The residual stream itself passes a norm (post-norm), so branches of zero leave the normed input."""

    def block(self, *gains: float) -> nn.Module:
        """A block whose attention, feed-forward part and (third gain) memory multiply by a number."""
        branches = [_Branch(gain) for gain in gains]
        return self.component.build(layer_spec(), *branches, *([None] if len(branches) == 2 else [])).eval()

    def test_branches_of_zero_leave_the_residual_stream(self) -> None:
        x_BTD = noise(2, 5, 32)
        y_BTD = self.block(0.0, 0.0)(x_BTD, context(2, 5))
        if self.normed_stream:
            assert_close(y_BTD, nn.functional.rms_norm(x_BTD, (32,)), 1e-4)  # normed once or more: eps is what differs
        else:
            assert torch.equal(y_BTD, x_BTD)

    @pytest.mark.parametrize("branch", [0, 1, 2], ids=["attention", "feedforward", "memory"])
    def test_each_branch_acts_and_sees_the_context(self, branch: int) -> None:
        x_BTD, ctx = noise(2, 5, 32), context(2, 5)
        gains = [0.0, 0.0, 0.0]
        silent = self.block(*gains)(x_BTD, ctx)
        gains[branch] = -0.5
        block = self.block(*gains)
        assert (block(x_BTD, ctx) - silent).abs().max() > 1e-3 or self.normed_stream
        assert all(module.ctx is ctx for module in block.modules() if isinstance(module, _Branch))

    def test_a_layer_without_memory_equals_one_whose_memory_is_silent(self) -> None:
        without, silent = (
            self.block(*gains)(noise(2, 5, 32), context(2, 5)) for gains in ((0.5, -0.5), (0.5, -0.5, 0.0))
        )
        assert torch.equal(without, silent)

    def test_every_parameter_gets_a_finite_gradient(self) -> None:
        block = shaken(self.block(0.5, -0.5, 0.25))
        assert_every_parameter_learns(block, block(noise(2, 5, 32), context(2, 5)).pow(3).sum())

    def test_dropout_acts_in_training_alone(self) -> None:
        block = self.component.build(layer_spec(dropout=0.5), _Branch(1.0), _Branch(1.0), None)
        x_BTD = noise(2, 5, 32)
        once, again = (block.train()(x_BTD, context(2, 5)) for _ in range(2))
        assert not torch.equal(once, again)
        assert torch.equal(block.eval()(x_BTD, context(2, 5)), block(x_BTD, context(2, 5)))

    def test_it_compiles_in_one_graph(self) -> None:
        assert_compiles(self.block(0.5, -0.5, 0.25), noise(2, 5, 32), context(2, 5))
