"""RoPE tables, turns and ALiBi biases, held to transformers: frequencies bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sky_core.components.position import (
    Alibi,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    Scaling,
    YarnScaling,
)
from sky_core.model.context import Context
from sky_core.model.kernels import naive
from sky_core.model.mask import Mask
from sky_core.model.rope_scaling import yarn_mscale

pytest.importorskip("transformers", reason="transformers is an oracle of these tests, not a dependency")

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SCALINGS: list[Scaling] = [
    LinearScaling(factor=1.0),
    LinearScaling(factor=2.5),
    LinearScaling(factor=8.0),
    Llama3Scaling(factor=8.0, original_length=8192),
    Llama3Scaling(factor=32.0, original_length=8192),
    Llama3Scaling(factor=3.0, low_freq_factor=2.0, high_freq_factor=5.5, original_length=100),
    YarnScaling(factor=8.0, original_length=4096),
    YarnScaling(factor=1.0, original_length=4096),
    YarnScaling(factor=4.0, original_length=32768, truncate=False),
    YarnScaling(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
    YarnScaling(factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=1.2),
    YarnScaling(factor=40.0, original_length=4096, mscale=0.707),
    YarnScaling(factor=16.0, original_length=2048, attention_factor=1.3, beta_fast=20.0, beta_slow=2.0),
    YarnScaling(factor=2.0, original_length=16),
    DynamicScaling(factor=2.3, original_length=40),
]


def config(theta: float, head_dim: int, scaling: Scaling | None, fraction: float = 1.0, **options: Any) -> LlamaConfig:
    """A Llama whose RoPE is that of `Rope(theta, scaling, fraction)`."""
    rope: dict[str, Any] = {"rope_type": "default"}
    length = 64
    if scaling is not None:
        rope = {name: value for name, value in scaling.model_dump().items() if value is not None}
        rope["rope_type"] = rope.pop("kind")
        length = rope.pop("original_length", length)
        if rope["rope_type"] != "dynamic":
            rope["original_max_position_embeddings"] = length
    rope |= {"rope_theta": theta, "partial_rotary_factor": fraction}
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "head_dim": head_dim}
    return LlamaConfig(**sizes, max_position_embeddings=length, rope_parameters=rope, **options)


def at(positions_BT: torch.Tensor) -> Context:
    return Context(positions_BT, positions_BT=positions_BT, mask=Mask(), end=positions_BT.shape[1])


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
@pytest.mark.parametrize("scaling", SCALINGS, ids=repr)
def test_frequencies_and_attention_factors_are_those_of_transformers(
    scaling: Scaling, theta: float, head_dim: int
) -> None:
    expected, attention_factor = ROPE_INIT_FUNCTIONS[scaling.kind](config(theta, head_dim, scaling), "cpu")
    rope = Rope(theta=theta, scaling=scaling).build(4 * head_dim, head_dim, 64, 4)
    assert rope.frequencies_F.dtype == torch.float32
    assert torch.equal(rope.frequencies_F, expected)
    assert rope.attention_factor == attention_factor


@pytest.mark.parametrize("scaling", [None, *SCALINGS], ids=repr)
def test_tables_are_those_that_a_llama_reads(scaling: Scaling | None) -> None:
    positions_BT = torch.tensor([[0, 1, 7, 38, 39]])
    theirs = LlamaRotaryEmbedding(config(10000.0, 32, scaling))(torch.zeros(1), positions_BT)
    rope, ctx = Rope(scaling=scaling).build(128, 32, 64, 4), at(positions_BT)
    rope.prepare(ctx)
    for ours, table in zip(ctx.tables[rope.name], theirs, strict=True):
        assert torch.equal(ours[:, 0], table[..., :16])
        assert torch.equal(ours[:, 0], table[..., 16:])


@pytest.mark.parametrize("longest", [5, 39, 40, 41, 63, 4000])
def test_dynamic_tables_grow_with_the_sequence_as_those_of_transformers(longest: int) -> None:
    scaling = DynamicScaling(factor=2.3, original_length=40)
    positions_BT = torch.tensor([[0, 3, longest]])
    cos, _ = LlamaRotaryEmbedding(config(10000.0, 32, scaling))(torch.zeros(1), positions_BT)
    rope, ctx = Rope(scaling=scaling).build(128, 32, 64, 4), at(positions_BT)
    rope.prepare(ctx)
    assert torch.equal(ctx.tables[rope.name][0][:, 0], cos[..., :16])


def test_the_square_of_mscale_is_deepseeks_factor_of_the_attention_scale() -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    rope = {"rope_type": "yarn", "factor": 40.0, "mscale_all_dim": 0.8}
    assert 0.1 * yarn_mscale(40.0, 0.8) ** 2 == pytest.approx(yarn_apply_mscale(rope, 0.1), rel=1e-12)


@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.5, 1.0])
def test_partial_turns_are_those_of_gpt_neox(fraction: float) -> None:
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    rope, positions_BT = Rope(fraction=fraction).build(80, 40, 64, 2), torch.tensor([[0, 1, 7, 39, 38]])
    q_BHTE, k_BHTE = torch.randn(2, 1, 2, 5, 40).unbind()
    theirs = neox.GPTNeoXRotaryEmbedding(
        neox.GPTNeoXConfig(hidden_size=80, num_attention_heads=2, rotary_pct=fraction, max_position_embeddings=64)
    )
    expected = neox.apply_rotary_pos_emb(q_BHTE, k_BHTE, *theirs(q_BHTE, positions_BT))
    for actual, wanted in zip(rope.rotate(q_BHTE, k_BHTE, at(positions_BT)), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_interleaved_turns_are_those_of_gptj() -> None:
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    rope, positions_BT = Rope(interleaved=True).build(32, 16, 64, 2), torch.tensor([[0, 1, 7, 39, 38]])
    q_BHTE, k_BHTE = torch.randn(2, 1, 2, 5, 16).unbind()
    sin, cos = gptj.create_sinusoidal_positions(64, 16)[positions_BT].chunk(2, dim=-1)
    for actual, x_BHTE in zip(rope.rotate(q_BHTE, k_BHTE, at(positions_BT)), (q_BHTE, k_BHTE), strict=True):
        wanted = gptj.apply_rotary_pos_emb(x_BHTE.transpose(1, 2), sin, cos).transpose(1, 2)
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)  # its frequencies are rounded differently


def test_interleaved_products_are_those_of_deepseek() -> None:
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    rope, positions_BT = Rope(interleaved=True).build(32, 16, 64, 2), torch.tensor([[0, 1, 7, 39, 38]])
    q_BHTE, k_BHTE = torch.randn(2, 1, 2, 5, 16).unbind()
    tables = LlamaRotaryEmbedding(config(10000.0, 16, None))(q_BHTE, positions_BT)
    q, k = deepseek.apply_rotary_pos_emb_interleave(q_BHTE, k_BHTE, *tables)  # pairs come out in another order
    ours_q, ours_k = rope.rotate(q_BHTE, k_BHTE, at(positions_BT))
    torch.testing.assert_close(ours_q @ ours_k.mT, q @ k.mT, rtol=0, atol=1e-5)


def test_layers_with_bases_of_their_own_have_the_tables_of_gemma3() -> None:
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    local, whole = Rope(theta=1e4), Rope(theta=1e6, scaling=LinearScaling(factor=8.0))
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    theirs = gemma.Gemma3RotaryEmbedding(
        gemma.Gemma3TextConfig(
            head_dim=32, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], rope_parameters=rope
        )
    )
    positions_BT = torch.tensor([[0, 1, 7, 39, 38]])
    ctx = at(positions_BT)
    for ours, layer_type in ((local, "sliding_attention"), (whole, "full_attention")):
        encoding = ours.build(128, 32, 64, 4)
        encoding.prepare(ctx)
        for table, wanted in zip(
            ctx.tables[encoding.name], theirs(torch.zeros(1), positions_BT, layer_type), strict=True
        ):
            assert torch.equal(table[:, 0], wanted[..., :16])
    assert len(ctx.tables) == 2


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16, 20, 112])
def test_alibi_attends_as_bloom(heads: int) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    alibi = bloom.build_alibi_tensor(torch.ones(1, 9, dtype=torch.long), heads, torch.float32).view(1, heads, 1, 9)
    q, k, v = torch.randn(3, 1, heads, 9, 8).unbind()
    mask = Alibi().build(8 * heads, 8, 64, heads).mask(Mask())
    # Bloom adds slope * s instead of slope * (s - t): the same after softmax, up to fp32.
    scores = (q @ k.mT + alibi).masked_fill(~Mask().dense(9, 9), -torch.inf)
    torch.testing.assert_close(naive(q, k, v, mask, scale=1.0), scores.softmax(-1) @ v, rtol=0, atol=1e-5)
    torch.testing.assert_close(-mask.bias(9, 9)[0, :, 1, 0], alibi[0, :, 0, 1], rtol=1e-6, atol=0)
