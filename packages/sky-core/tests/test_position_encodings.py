"""Position encodings, held to the equations of their papers in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sky_core.components.position import Learned, NoPosition, Rope, Sinusoidal
from sky_core.model.context import Context
from sky_core.model.mask import Mask
from sky_core.model.rope import RotaryPosition


def at(*positions: int) -> Context:
    """A pass over one row with these positions."""
    return Context(torch.tensor([positions]), positions_BT=torch.tensor([positions]), mask=Mask(), end=len(positions))


def turned(x: torch.Tensor, position: int, theta: float = 10000.0) -> torch.Tensor:
    """Equation 34 of the RoPE paper as complex numbers: pair i is (x[i], x[i + E/2])."""
    half = x.shape[-1] // 2
    angles = torch.tensor([position * theta ** (-2 * i / (2 * half)) for i in range(half)], dtype=torch.float64)
    planes = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones(half).double(), angles
    )
    return torch.cat((planes.real, planes.imag), dim=-1)


@settings(deadline=None)
@given(positions=st.lists(st.integers(0, 5000), min_size=1, max_size=5), theta=st.sampled_from([100.0, 10000.0, 5e5]))
def test_rope_turns_each_plane_by_its_angle(positions: list[int], theta: float) -> None:
    q, k = torch.randn(1, 3, len(positions), 8), torch.randn(1, 1, len(positions), 8)
    rope = Rope(theta=theta).build(24, 8, 10_000, 3)
    for actual, x in zip(rope.rotate(q, k, at(*positions)), (q, k), strict=True):
        expected = torch.stack([turned(x[:, :, t], position, theta) for t, position in enumerate(positions)], dim=2)
        # An angle of 5000 radians is known to 5000 * 6e-8 = 3e-4 in fp32.
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-3)


@settings(deadline=None)
@given(t=st.integers(0, 500), s=st.integers(0, 500), shift=st.integers(0, 500))
def test_rope_products_depend_on_the_distance_alone(t: int, s: int, shift: int) -> None:
    rope, q, k = RotaryPosition(16, 10000.0), torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(at_q: int, at_k: int) -> torch.Tensor:
        return (rope.rotate(q, q, at(at_q))[0] * rope.rotate(k, k, at(at_k))[0]).sum()

    torch.testing.assert_close(product(t + shift, s + shift), product(t, s), rtol=0, atol=5e-3)


def test_rope_keeps_the_dtype_and_tables_stay_fp32() -> None:
    rope, ctx = RotaryPosition(8, 10000.0), at(0, 1, 2)
    q, _ = rope.rotate(torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 1, 3, 8).bfloat16(), ctx)
    assert q.dtype == torch.bfloat16
    assert {table.dtype for table in ctx.tables[rope.name]} == {torch.float32}
    exact = rope.frequencies_F.clone()
    assert torch.equal(rope.bfloat16().double().frequencies_F, exact)
    assert not rope.state_dict()


def test_rope_tables_are_made_once_per_pass() -> None:
    first, second, ctx = RotaryPosition(8, 10000.0), RotaryPosition(8, 10000.0), at(0, 1)
    first.prepare(ctx)
    tables = ctx.tables[first.name]
    second.prepare(ctx)
    assert ctx.tables[second.name] is tables
    RotaryPosition(8, 500.0).prepare(ctx)
    assert len(ctx.tables) == 2


def test_sinusoids_are_those_of_the_paper() -> None:
    x_BTD, positions = torch.randn(2, 3, 6), (0, 4, 90)
    actual = Sinusoidal().build(6, 3, 100, 2).embed(x_BTD, at(*positions))
    wave = [
        [(math.sin if d % 2 == 0 else math.cos)(t / 10000 ** (2 * (d // 2) / 6)) for d in range(6)] for t in positions
    ]
    torch.testing.assert_close(actual, x_BTD * math.sqrt(6) + torch.tensor(wave), rtol=0, atol=1e-5)


def test_learned_positions_add_their_row() -> None:
    learned = Learned().build(6, 3, 10, 2)
    torch.nn.init.normal_(learned.embed_positions.weight)
    x_BTD = torch.randn(2, 3, 6)
    assert torch.equal(learned.embed(x_BTD, at(7, 0, 7)), x_BTD + learned.embed_positions.weight[[7, 0, 7]])


@pytest.mark.parametrize("component", [Learned(), Sinusoidal(), NoPosition()])
def test_encodings_of_the_embedding_leave_queries_and_keys_alone(component) -> None:
    in_layers = component.build(8, 4, 10, 2).in_layers()
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4)
    assert all(a is b for a, b in zip(in_layers.rotate(q, k, at(0, 1, 2)), (q, k), strict=True))
    assert not list(in_layers.parameters())


@pytest.mark.parametrize("component", [Rope(), NoPosition()])
def test_encodings_of_the_layers_leave_the_embedding_alone(component) -> None:
    x_BTD = torch.randn(1, 3, 8)
    assert component.build(8, 4, 10, 2).embed(x_BTD, at(0, 1, 2)) is x_BTD
