"""Weights in 8 and 4 bits: the nearest code, one product by several ways, models that stay what they were."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sky_core.errors import UserError
from sky_core.generation.text import generate
from sky_core.model.adapter import Attached
from sky_core.model.decoder import DecoderLM
from sky_core.quantization import QuantizedLinear, int4, linear, quantize_
from sky_core.quantization.int4 import Int4Linear, pack_panels, quantize_groups, unpack_panels
from sky_core.quantization.int8 import Int8Linear, quantize_rows
from sky_core.testing.workbench import assert_close, assert_same_weights, noise, shaken, tiny_model, weights
from sky_core.tokenizer.byte import ByteTokenizer

FORMATS: dict[str, Callable[[nn.Linear], QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}
each_format = pytest.mark.parametrize("kind", FORMATS)

BF16 = 2.0**-8
"""What rounding to bf16 (8 significant bits) moves a number by, relative to it, at most."""


def layer_of(kind: str, n: int = 200, k: int = 64, *, bias: bool = True, seed: int = 0) -> QuantizedLinear:
    """A quantised layer; 200 output features are no whole number of the kernels' panels."""
    given_layer = nn.Linear(k, n, bias=bias)
    given_layer.weight.data = noise(n, k, seed=seed) * 10 ** noise(n, 1, seed=seed + 1)
    if bias:
        given_layer.bias.data = noise(n, seed=seed + 2)
    return FORMATS[kind](given_layer).eval()


def exactly(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """x Wᵀ + b in float64, of the weights that the layer says it has."""
    y = x.double() @ layer.weight.double().T
    return y if layer.bias is None else y + layer.bias.double()


def reach(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """Σ |x| |w|: what fp32 sums of these products round relative to."""
    return x.double().abs() @ layer.weight.double().abs().T


# ------------------------------------------------------------------------------------------------- the equations

MATRICES = st.tuples(
    st.integers(0, 2**32), st.integers(1, 5), st.sampled_from([32, 96]), st.floats(-25, 25), st.floats(0, 3)
)


def matrix(seed: int, n: int, k: int, exponent: float, spread: float) -> torch.Tensor:
    """Rows of very different sizes, with outliers, an empty row and a constant one."""
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(n + 2, k, generator=generator) * 10 ** (spread * torch.randn(n + 2, 1, generator=generator))
    w_NK[0, torch.randint(k, (2,), generator=generator)] *= 50
    w_NK[-2], w_NK[-1] = 0.0, w_NK[0, 0]
    return w_NK * 10**exponent


@given(MATRICES)
def test_int8_takes_the_nearest_code(given_matrix: Any) -> None:
    w_NK = matrix(*given_matrix)
    codes_NK, scales_N = quantize_rows(w_NK)
    assert scales_N.equal(scales_N.bfloat16().float())
    steps_NK = w_NK.double() / scales_N.double()[:, None]
    # Half a step, and what fp32 rounds a quotient of up to 127 steps by.
    assert (codes_NK - steps_NK).abs().max() <= 0.5 + 127 * 2**-23
    assert codes_NK.abs().max() <= 127


@given(MATRICES)
def test_int4_takes_the_nearest_code_of_its_group(given_matrix: Any) -> None:
    w_NK = matrix(*given_matrix)
    codes_NK, scales_gN, zeros_gN = quantize_groups(w_NK, 32)
    for part in (scales_gN, zeros_gN):
        assert part.equal(part.bfloat16().float())
    s_NK, z_NK = (part.T.double().repeat_interleave(32, dim=1) for part in (scales_gN, zeros_gN))
    error_NK = (codes_NK.double() - 8) * s_NK + z_NK - w_NK
    # Half a step, and what fp32 rounds differences and quotients of about 15 steps by.
    assert (error_NK / s_NK).abs().max() <= 0.5 + 15 * 2**-21
    assert codes_NK.max() <= 15


@each_format
def test_the_weight_is_what_the_codes_say(kind: str) -> None:
    layer, w_NK = layer_of(kind), noise(200, 64) * 10 ** noise(200, 1, seed=1)
    if kind == "int8":
        codes_NK, scales_N = quantize_rows(w_NK)
        assert layer.weight.equal(codes_NK * scales_N[:, None])
    else:
        codes_NK, scales_gN, zeros_gN = quantize_groups(w_NK, 32)
        s_NK, z_NK = (part.T.double().repeat_interleave(32, dim=1) for part in (scales_gN, zeros_gN))
        assert_close(layer.double().weight, (codes_NK.double() - 8) * s_NK + z_NK, 1e-15)


@given(st.integers(1, 3), st.sampled_from([32, 64]), st.integers(1, 5), st.integers(0, 2**32))
def test_panels_hold_every_code_in_its_place(panels: int, panel: int, k: int, seed: int) -> None:
    codes_NK = torch.randint(
        16, (panels * panel, 2 * k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    assert unpack_panels(pack_panels(codes_NK, panel), panel).equal(codes_NK.T)


# --------------------------------------------------------------------------------------- one product, several ways


@each_format
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_packed_kernel_multiplies_the_same_matrix(kind: str, rows: int) -> None:
    layer = layer_of(kind, bias=False)
    x_MK = noise(rows, 64, seed=5).bfloat16()
    assert layer.obstacle is None, "this test needs a CPU with the kernel"
    expected_MN, reach_MN = exactly(layer, x_MK), reach(layer, x_MK)
    # Weights are widened and summed in fp32, so that only y is rounded to bf16. The kernel may fold 8 s into z.
    assert ((layer.packed(x_MK) - expected_MN).abs() <= BF16 * expected_MN.abs() + 1e-5 * reach_MN).all()


@each_format
def test_many_rows_and_few_differ_by_the_rounding_of_activations(kind: str) -> None:
    layer = layer_of(kind)
    x_MK = noise(layer.few_rows + 1, 64, seed=5)
    with torch.no_grad():
        many_MN = layer(x_MK)
        few_MN = torch.cat([layer(row) for row in x_MK.split(1)])
    expected_MN, reach_MN = exactly(layer, x_MK), reach(layer, x_MK)
    assert ((many_MN - expected_MN).abs() <= 1e-5 * (1 + reach_MN)).all()
    assert ((few_MN - expected_MN).abs() <= 2 * BF16 * reach_MN + 1e-5).all()
    assert not few_MN.equal(many_MN), "few rows did not take the kernel"


@each_format
def test_blocks_are_bounded_and_meet(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x_MK = layer_of(kind), noise(100, 64)
    whole_MN, weight_NK = layer(x_MK), layer.weight
    monkeypatch.setattr(linear, "BLOCK", 64 * 70)
    sizes = [w_NK.numel() for w_NK, _ in layer.blocks(torch.float32)]
    assert len(sizes) > 2
    assert max(sizes) <= 64 * 70
    assert_close(layer(x_MK), whole_MN)
    assert layer.weight.equal(weight_NK)


@each_format
def test_views_and_shapes_are_taken_as_they_come(kind: str) -> None:
    layer = layer_of(kind)
    x = noise(2, 5, 64 * 2)[:, ::2, 5:69]  # rows that are apart and begin anywhere
    assert layer(x).shape == (2, 3, 200)
    assert_close(layer(x).double(), exactly(layer, x), 0.05)
    crooked = noise(1 + 64)[1:].bfloat16()  # contiguous, but not where aligned loads may begin
    assert_close(layer(crooked).double(), exactly(layer, crooked), 0.05)
    assert layer(noise(0, 64)).shape == (0, 200)


@each_format
def test_activations_keep_their_dtype_and_follow_autocast(kind: str) -> None:
    layer = layer_of(kind)
    for rows in (1, 100):
        x_MK = noise(rows, 64)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert layer(x_MK.to(dtype)).dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x_MK).equal(layer(x_MK.bfloat16()))


@each_format
def test_a_cast_to_bf16_changes_no_weight(kind: str) -> None:
    layer = layer_of(kind)
    before = layer.weight
    layer.bfloat16()  # and what else a model may be cast to
    assert layer.scales.dtype == torch.bfloat16
    assert layer.weight.equal(before)
    assert layer.float().weight.equal(before)


@pytest.mark.parametrize(("kind", "k", "reason"), [("int8", 24, "multiple of 16"), ("int4", 48, "groups of 32")])
def test_shapes_that_the_kernel_does_not_take_are_dequantised(kind: str, k: int, reason: str) -> None:
    given_layer = nn.Linear(k, 10)
    layer = Int8Linear(given_layer) if kind == "int8" else Int4Linear(given_layer, group=16)
    assert layer.obstacle is not None
    assert reason in layer.obstacle
    x_MK = noise(2, k)
    with torch.no_grad():
        # No rounding of activations: this is the product in fp32.
        assert_close(layer(x_MK).double(), exactly(layer, x_MK))


@each_format
def test_a_cpu_without_the_kernel_dequantises(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(int4, "kernel_panel", lambda: None)
    layer = layer_of(kind)
    assert layer.obstacle is not None
    assert "CPU" in layer.obstacle
    with torch.no_grad():
        assert ((layer(noise(1, 64)) - exactly(layer, noise(1, 64))).abs() <= 1e-5 * reach(layer, noise(1, 64))).all()


# ------------------------------------------------------------------------------------------ gradients and graphs


@each_format
def test_the_gradient_of_the_input_is_that_of_the_exact_product(kind: str) -> None:
    layer = layer_of(kind, n=70, k=32).double()
    x = noise(2, 3, 32).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    layer.float()(x.float()).sum().backward()
    assert x.grad is not None


@each_format
@pytest.mark.parametrize("rows", [2, 100])
def test_it_compiles_into_one_graph(kind: str, rows: int) -> None:
    torch._dynamo.reset()
    layer = layer_of(kind)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert compiled(noise(rows, 64)).equal(layer(noise(rows, 64)))


@each_format
def test_it_compiles_into_one_graph_for_adapters_too(kind: str) -> None:
    torch._dynamo.reset()
    layer, gradients = layer_of(kind), []
    for module in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        x_MK = noise(2, 64).requires_grad_()
        module(x_MK).square().sum().backward()
        gradients.append(x_MK.grad)
    assert_close(gradients[1], gradients[0])


# --------------------------------------------------------------------------------------------------- whole models

WIDE: dict[str, Any] = {"d_model": 64, "n_head": 2, "n_kv_head": 1}
MOE: dict[str, Any] = {"kind": "moe", "n_experts": 4, "top_k": 2, "d_ff": 32, "n_shared": 1}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, with biases": {"tie_embeddings": False, "bias": True},
    "experts": {"feedforward": MOE},
    "value embeddings": {"attention": {"kind": "full", "value_embedding": True}},
    "multi-token prediction": {"n_mtp": 1},
}
each_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())


def decoder(**options: Any) -> DecoderLM:
    lm = shaken(tiny_model(200, **(WIDE | options)))
    assert isinstance(lm, DecoderLM)
    return lm


def tokens(batch: int = 2, time: int = 9) -> torch.Tensor:
    return torch.randint(200, (batch, time), generator=torch.Generator().manual_seed(0))


def twin_of(lm: DecoderLM, quantized: DecoderLM) -> DecoderLM:
    """`lm` with the weights that `quantized` multiplies, in ordinary layers."""
    twin = copy.deepcopy(lm)
    for path, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLinear):
            like = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            like.load_state_dict({"weight": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias}))
            parent, _, name = path.rpartition(".")
            setattr(twin.get_submodule(parent), name, like)
    return twin.eval()


def quantized(lm: DecoderLM, kind: str, **options: Any) -> DecoderLM:
    lm = copy.deepcopy(lm)
    quantize_(lm, kind, **options)
    return lm


@pytest.fixture
def only_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """No packed kernels: everything in the dtype of the activations."""
    for layer in FORMATS.values():
        monkeypatch.setattr(layer, "few_rows", 0)


@each_format
@each_model
def test_a_quantised_model_is_the_model_with_rounded_weights(
    kind: str, options: dict[str, Any], only_products: None
) -> None:
    lm = decoder(**options)
    small = quantized(lm, kind)
    twin, tokens_BT = twin_of(lm, small), tokens()
    assert_close(small(tokens_BT), twin(tokens_BT), 1e-4)  # a few layers of fp32 sums in another order
    hidden_BTD = small.hidden(tokens_BT)
    assert_close(small.nll(hidden_BTD, tokens_BT), twin.nll(hidden_BTD, tokens_BT), 1e-4)
    # And not far from the model itself: random weights give about 2 % in eight bits and 20 to 30 % in four.
    error = (small(tokens_BT) - lm(tokens_BT)).norm() / lm(tokens_BT).norm()
    assert 0 < error < (0.04 if kind == "int8" else 0.5)


@each_format
@each_model
def test_what_is_no_plain_linear_layer_stays_exact(kind: str, options: dict[str, Any]) -> None:
    lm = decoder(**options)
    small = quantized(lm, kind)
    left = dict(small.named_parameters())
    for name, parameter in lm.named_parameters():
        module = lm.get_submodule(name.rpartition(".")[0])
        assert (type(module) is nn.Linear) == (name not in left), name
        if name in left:
            assert left[name].equal(parameter)
    assert isinstance(small.lm_head, QuantizedLinear)
    assert small.embed_tokens.weight.dtype == torch.float32


@each_format
def test_the_head_may_stay(kind: str) -> None:
    assert quantized(decoder(), kind, head=False).lm_head is None
    untied = quantized(decoder(tie_embeddings=False), kind, head=False)
    assert type(untied.lm_head) is nn.Linear


@each_format
def test_layers_can_be_left_out_by_the_end_of_their_names(kind: str) -> None:
    small = quantized(decoder(), kind, exclude=["down_proj", "layers.0.self_attn.q_proj"])
    exact = {path for path, module in small.named_modules() if type(module) is nn.Linear}
    assert exact == {"layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "layers.0.self_attn.q_proj"}


@each_format
@each_model
def test_a_state_dict_comes_back_exactly(kind: str, options: dict[str, Any]) -> None:
    small = quantized(decoder(**options), kind)
    state = weights(small)
    again = tiny_model(200, seed=7, **(WIDE | options))
    quantize_(again, kind)
    again.load_state_dict(state)
    assert_same_weights(again, state)
    assert again(tokens()).equal(small(tokens()))


def test_a_state_dict_of_int4_does_not_depend_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    here = layer_of("int4")
    monkeypatch.setattr(int4, "kernel_panel", lambda: 32)
    there = layer_of("int4", seed=9)
    assert there.codes.shape != here.codes.shape
    there.load_state_dict(here.state_dict())
    assert there.weight.equal(here.weight)
    assert here.state_dict()["codes"].shape == (200, 32)
    with pytest.raises(RuntimeError, match=r"Missing key.*codes"):
        there.load_state_dict({})


@each_format
def test_decoding_with_a_cache_equals_the_parallel_pass(kind: str) -> None:
    small = quantized(decoder(), kind)
    tokens_BT = tokens(time=40)  # more rows than the kernels take: the parallel pass takes the other way
    with torch.no_grad():
        parallel_BTV = small(tokens_BT)
        cache = small.new_cache(2)
        steps = [small(tokens_BT[:, t : t + 1], cache=cache) for t in range(40)]
    # Steps round activations to bf16 in front of each product; a dozen of them, each 2^-9 relative.
    error = (torch.cat(steps, dim=1) - parallel_BTV).norm() / parallel_BTV.norm()
    assert error < 6 * BF16


@each_format
def test_text_is_generated(kind: str) -> None:
    lm = tiny_model(256, **WIDE)
    quantize_(lm, kind)
    assert isinstance(generate(lm, ByteTokenizer(), "to be", max_new_tokens=5), str)


@each_format
def test_only_what_is_attached_can_be_trained(kind: str) -> None:
    small = quantized(decoder(), kind)
    assert not any(parameter.requires_grad for parameter in small.parameters())
    delta = nn.Linear(64, 32, bias=False)
    Attached(small, delta).linear(small.layers[0].self_attn.v_proj, lambda x, y: y + delta(x))
    small.nll(small.hidden(tokens()), tokens()).backward()
    assert delta.weight.grad is not None
    assert delta.weight.grad.abs().max() > 0


# --------------------------------------------------------------------------------------------- what users are told


def test_the_log_says_once_what_was_chosen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sky_core.quantization"):
        quantize_(decoder(feedforward=MOE), "int8")
    assert caplog.messages == [
        "int8: 15 linear layers, 0.2 MB of weights in 0.1 MB",
        "int8: 15 layers: torch's packed kernel up to 16 rows, dequantised products above",
        "int8: left exact: 1 Embedding, 2 Router, 2 Experts",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "sky_core.quantization"):
        quantize_(tiny_model(200, d_model=24, n_head=2), "int8", exclude=["down_proj"])
    assert "13 layers: dequantised for every product: their in_features are no multiple of 16" in caplog.messages[1]


def broken(lm: DecoderLM) -> DecoderLM:
    lm.layers[1].mlp.up_proj.weight.data[3, 4] = float("inf")
    return lm


def adapted(lm: DecoderLM) -> DecoderLM:
    Attached(lm, nn.Linear(1, 1))
    return lm


@pytest.mark.parametrize(
    ("make", "arguments", "told"),
    [
        (decoder, ["int9"], r"'int9' \(have: int8, int4\); did you mean"),
        (
            lambda: decoder(d_model=48),
            ["int4"],
            r"int4: layers.0.self_attn.q_proj has 48 .* group of 32",
        ),
        (decoder, ["int4", {"group": 3}], "groups of 3; give an even number"),
        (decoder, ["int8", {"exclude": ["up_porj"]}], "no linear layer is called 'up_porj'.*up_proj"),
        (lambda: broken(decoder()), ["int8"], "the weight of layers.1.mlp.up_proj is not finite"),
        (lambda: adapted(decoder()), ["int4"], "an adapter is attached"),
        (lambda: quantized(decoder(), "int8"), ["int4"], "quantised already"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(make: Callable[[], DecoderLM], arguments: list[Any], told: str) -> None:
    lm = make()
    kind, *options = arguments
    before = [type(module) for module in lm.modules()]
    with pytest.raises(UserError, match=told) as caught:
        quantize_(lm, kind, **(options[0] if options else {}))
    assert "\n" not in str(caught.value)
    assert [type(module) for module in lm.modules()] == before


def test_runs_are_loaded_sampled_and_measured_in_fewer_bits(lab: Any) -> None:
    import sky_core

    lab.write(model={"d_model": 32})
    folder = lab.train().directory
    lm, _ = sky_core.load(folder, quantize="int4")
    assert any(isinstance(module, QuantizedLinear) for module in lm.modules())
    assert lab.sky("sample", folder, "--quantize", "int8", "--max-new-tokens", "3").code == 0
    events = (folder / "events.jsonl").read_text()
    told = lab.sky("eval", folder, "--quantize", "int4")
    assert told.code == 0
    assert "fp32, int4 weights" in told.out
    assert (folder / "events.jsonl").read_text() == events
    assert lab.sky("sample", folder, "--quantize", "int3").errors == [
        "sky: no format of weights is called 'int3' (have: int8, int4); did you mean 'int8'?"
    ]
