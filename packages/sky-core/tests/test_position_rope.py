"""Variants of RoPE: parts of a head, planes that stand still, contexts longer than those of training."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sky_core.components.model import Decoder
from sky_core.components.position import (
    Alibi,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    NoPosition,
    Rope,
    YarnScaling,
)
from sky_core.errors import UserError
from sky_core.model.context import Context
from sky_core.model.mask import Mask
from sky_core.slots import Position

YARN = YarnScaling(factor=4.0, original_length=8)
VARIANTS: dict[str, list[Position]] = {
    "linear": [Rope(scaling=LinearScaling(factor=4.0))],
    "llama3": [Rope(scaling=Llama3Scaling(factor=4.0, original_length=8))],
    "yarn": [Rope(scaling=YARN)],
    "dynamic": [Rope(scaling=DynamicScaling(factor=4.0, original_length=32))],
    "partial": [Rope(fraction=0.5)],
    "truncated": [Rope(truncated=True)],
    "interleaved": [Rope(interleaved=True, fraction=0.5, scaling=YARN)],
    "alibi": [Alibi()],
    "local and global": [Rope(), Rope(theta=1e6), NoPosition()],
    "all at once": [Alibi(), Rope(scaling=YARN), Rope(fraction=0.25)],
}
EVERY_VARIANT = pytest.mark.parametrize("positions", VARIANTS.values(), ids=VARIANTS)


def at(*positions: int, **options: torch.Tensor) -> Context:
    positions_BT = torch.tensor([positions])
    return Context(positions_BT, positions_BT=positions_BT, mask=Mask(), end=len(positions), **options)


def decoder(positions: list[Position], max_length: int = 32):
    torch.manual_seed(0)
    config = Decoder(
        n_layer=3, n_head=3, d_model=24, max_length=max_length, position=tuple(positions), initializer_range=0.4
    )
    return config.build(31).eval()


@EVERY_VARIANT
def test_decoding_step_by_step_equals_the_parallel_forward(positions: list[Position]) -> None:
    model, tokens_BT = decoder(positions), torch.randint(31, (2, 20))
    cache = model.new_cache(2)
    steps = torch.cat([model(piece, cache=cache) for piece in tokens_BT.split([5, 1, 1, 8, 1, 4], dim=1)], dim=1)
    expected = model(tokens_BT)
    # fp32 sums in another order, relative to the largest logit
    torch.testing.assert_close(steps, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@EVERY_VARIANT
def test_documents_of_a_packed_row_start_afresh(positions: list[Position]) -> None:
    model, tokens_BT = decoder(positions), torch.randint(31, (1, 12))
    documents_BT = torch.tensor([[0] * 5 + [1] * 7])
    positions_BT = torch.tensor([[*range(5), *range(7)]])
    packed = model(tokens_BT, documents_BT=documents_BT, positions_BT=positions_BT)
    alone = torch.cat((model(tokens_BT[:, :5]), model(tokens_BT[:, 5:])), dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5 * alone.abs().max().item())


def test_planes_past_the_fraction_stay_as_they_are() -> None:
    rope, q_BHTE = Rope(fraction=0.25).build(32, 16, 64, 2), torch.randn(1, 2, 3, 16)
    turned, _ = rope.rotate(q_BHTE, q_BHTE, at(1, 2, 3))
    assert torch.equal(turned[..., 4:], q_BHTE[..., 4:])
    expected, _ = Rope().build(8, 4, 64, 2).rotate(q_BHTE[..., :4], q_BHTE[..., :4], at(1, 2, 3))
    assert torch.equal(turned[..., :4], expected)


def test_interleaved_planes_are_those_of_the_halves_in_another_order() -> None:
    halves, pairs = (Rope(interleaved=interleaved).build(32, 16, 64, 2) for interleaved in (False, True))
    order = torch.arange(16).view(2, 8).t().flatten()  # 0, 8, 1, 9, ...
    q_BHTE = torch.randn(1, 2, 3, 16)
    expected, _ = halves.rotate(q_BHTE, q_BHTE, at(1, 2, 3))
    actual, _ = pairs.rotate(q_BHTE[..., order], q_BHTE[..., order], at(1, 2, 3))
    assert torch.equal(actual, expected[..., order])


def test_half_truncated_rope_is_that_of_modded_nanogpt() -> None:
    """Its `Rotary`, written down: a quarter of the head's numbers as frequencies, then zeros; y = conj(turn) x."""
    frequencies = torch.cat(((1 / 1024) ** torch.linspace(0, 1, steps=4), torch.zeros(4)))
    angle_TF = torch.outer(torch.tensor([0.0, 1.0, 7.0, 50.0]), frequencies)

    def theirs(x_BHTE: torch.Tensor) -> torch.Tensor:
        a, b = x_BHTE.chunk(2, dim=-1)
        cos, sin = angle_TF.cos(), angle_TF.sin()
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

    rope = Rope(truncated=True, theta=1024.0).build(32, 16, 64, 2)
    q_BHTE, k_BHTE = torch.randn(2, 1, 2, 4, 16).unbind()
    q, k = rope.rotate(q_BHTE, k_BHTE, at(0, 1, 7, 50))
    assert torch.equal(rope.frequencies_F, frequencies)
    assert torch.equal(q[..., 4:8], q_BHTE[..., 4:8])
    # It turns the other way round, which a mirror image of each plane undoes.
    mirror = torch.tensor([1.0] * 8 + [-1.0] * 8)
    torch.testing.assert_close(q, theirs(q_BHTE * mirror) * mirror, rtol=0, atol=1e-6)
    torch.testing.assert_close(q @ k.mT, theirs(q_BHTE * mirror) @ theirs(k_BHTE * mirror).mT, rtol=0, atol=1e-5)


def test_encodings_that_differ_in_any_option_have_tables_of_their_own() -> None:
    variants = [
        Rope(),
        Rope(theta=500.0),
        Rope(fraction=0.5),
        Rope(truncated=True),
        *(
            Rope(scaling=scaling)
            for scaling in (
                LinearScaling(factor=4.0),
                LinearScaling(factor=8.0),
                DynamicScaling(factor=4.0, original_length=8),
                DynamicScaling(factor=4.0, original_length=9),
                Llama3Scaling(factor=4.0, original_length=8),
                Llama3Scaling(factor=4.0, original_length=8, low_freq_factor=0.5),
                YARN,
                YARN.model_copy(update={"beta_fast": 31.0}),
                YARN.model_copy(update={"truncate": False}),
                YARN.model_copy(update={"attention_factor": 1.1}),
                YARN.model_copy(update={"mscale": 1.0, "mscale_all_dim": 0.5}),
            )
        ),
    ]
    ctx = at(0, 1, 2, 9)
    encodings = [variant.build(32, 16, 64, 2) for variant in variants]
    for encoding in encodings:
        encoding.prepare(ctx)
    assert len(ctx.tables) == len(variants)
    assert all(one.name != other.name for one, other in combinations(encodings, 2))


@pytest.mark.parametrize(
    ("rope", "head_dim", "problem"),
    [
        (Rope(), 7, "head_dim must be even, not 7"),
        (Rope(fraction=0.3), 10, "fraction 0.3 of head_dim 10 must be even, not 3"),
        (Rope(fraction=0.01), 10, "fraction 0.01 of head_dim 10 must be at least 2, not 0"),
        (Rope(truncated=True), 6, "head_dim must be a multiple of 4, not 6"),
        (
            Rope(scaling=DynamicScaling(factor=2.0, original_length=8)),
            2,
            "head_dim must be even and more than 2, not 2",
        ),
    ],
)
def test_heads_that_do_not_hold_whole_planes_are_refused(rope: Rope, head_dim: int, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        rope.build(2 * head_dim, head_dim, 64, 2)
    with pytest.raises(ValueError, match=problem):
        Decoder(n_head=2, d_model=2 * head_dim, position=(rope,))


def test_truncated_rope_is_not_stretched() -> None:
    with pytest.raises(ValueError, match="truncated rope has no scaling"):
        Rope(truncated=True, scaling=YARN)


class TestDynamic:
    """The base grows with the sequence: what that means for rows, padding, caches and later passes."""

    rope = Rope(scaling=DynamicScaling(factor=2.0, original_length=8))

    def cosines(self, ctx: Context) -> torch.Tensor:
        encoding = self.rope.build(32, 16, 64, 2)
        encoding.prepare(ctx)
        return ctx.tables[encoding.name][0][:, 0]

    @settings(deadline=None)
    @given(tokens=st.integers(1, 40))
    def test_up_to_the_original_length_it_is_plain(self, tokens: int) -> None:
        plain, ctx = Rope().build(32, 16, 64, 2), at(*range(tokens))
        plain.prepare(ctx)
        assert torch.equal(self.cosines(ctx), ctx.tables[plain.name][0][:, 0]) == (tokens <= 8)

    def test_rows_and_padding_do_not_change_each_other(self) -> None:
        positions_BT = torch.arange(12).repeat(2, 1)
        valid_BT = torch.arange(12) < torch.tensor([[12], [9]])
        both = self.cosines(Context(positions_BT, positions_BT=positions_BT, mask=Mask(), end=12, valid_BT=valid_BT))
        assert torch.equal(both[:1], self.cosines(at(*range(12))))
        assert torch.equal(both[1:, :9], self.cosines(at(*range(9))))

    def test_nothing_is_remembered_of_a_longer_pass(self) -> None:
        encoding, before = self.rope.build(32, 16, 64, 2), self.cosines(at(*range(10)))
        encoding.prepare(at(*range(40)))
        after = at(*range(10))
        encoding.prepare(after)
        assert torch.equal(after.tables[encoding.name][0][:, 0], before)

    def test_past_the_original_length_cached_keys_keep_the_base_that_they_came_with(self) -> None:
        model, tokens_BT = decoder([self.rope]), torch.randint(31, (1, 12))
        cache, expected = model.new_cache(1), model(tokens_BT)
        steps = torch.cat([model(token, cache=cache) for token in tokens_BT.split(1, dim=1)], dim=1)
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(steps[:, :8], model(tokens_BT[:, :8]), rtol=0, atol=tolerance)
        assert (steps[:, 8:] - expected[:, 8:]).abs().max() > 10 * tolerance


def test_the_ramp_of_yarn_keeps_fast_planes_and_interpolates_slow_ones() -> None:
    plain, yarn = (
        Rope(scaling=scaling).build(128, 64, 64, 2).frequencies_F
        for scaling in (None, YarnScaling(factor=8.0, original_length=4096))
    )
    assert torch.equal(yarn[:8], plain[:8])  # 20 and more turns in 4096 tokens
    torch.testing.assert_close(yarn[-8:], plain[-8:] / 8, rtol=1e-6, atol=0)  # less than one turn
