"""Decoding compiled as one graph gives what decoding uncompiled gives."""

from __future__ import annotations

import copy
import gc
import logging
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from sky_core import native
from sky_core.bench.shape import id_tokenizer
from sky_core.components.generation import Sample
from sky_core.components.model import Decoder
from sky_core.errors import UserError
from sky_core.generation.decode import generate_tokens
from sky_core.generation.generator import Generator
from sky_core.model import decoding
from sky_core.model.adapter import Attached
from sky_core.model.cache import KVCache
from sky_core.model.decoder import DecoderLM
from sky_core.model.decoding_operators import FewRows, Join
from sky_core.model.norm import RMSNorm
from sky_core.quantization import QuantizedLinear, quantize_
from sky_core.quantization.int4 import Int4Linear
from sky_core.quantization.int8 import Int8Linear

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"norm": "rmsnorm", "position": "rope", "feedforward": "swiglu", "n_kv_head": 2, "qk_norm": "head"},
    "gpt": {"norm": "layernorm", "position": "learned", "feedforward": "gelu", "bias": True},
    "gemma": {
        "block": "sandwich",
        "attention": [{"kind": "full", "window": 5, "softcap": 20.0}, "full"],
        "logit_softcap": 10.0,
        "scale_embeddings": True,
        "tie_embeddings": False,
    },
    "moe": {"feedforward": {"kind": "moe", "n_experts": 4, "top_k": 2, "d_ff": 24}, "position": "alibi"},
    "wide": {"n_layer": 1, "d_model": 64, "n_head": 2, "n_kv_head": 1},  # heads that the native attention takes
}


NO_INT4 = "4 bits by native operators need AVX512_VNNI and AVX512_VBMI"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


def build(kind: str = "llama", **more: Any) -> DecoderLM:
    torch.manual_seed(0)
    options = {"n_layer": 2, "n_head": 4, "d_model": 32, "max_length": 64, "initializer_range": 0.2, **KINDS[kind]}
    model = Decoder.model_validate(options | more).build(50).eval().requires_grad_(False)
    assert isinstance(model, DecoderLM)
    for module in model.modules():
        if isinstance(module, RMSNorm) and module.weight is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
    return model


def logits_of(model: DecoderLM, rows: int, steps: int) -> torch.Tensor:
    """logits_SBV of steps behind prompts of different lengths."""
    torch.manual_seed(1)
    prompt_BT = torch.randint(50, (rows, 6))
    valid_BT = torch.arange(6) < 6 - torch.arange(rows)[:, None]
    with torch.inference_mode():
        cache = model.new_cache(rows, 40)
        model.hidden(prompt_BT, valid_BT=valid_BT, cache=cache)
        return torch.stack([model.step(torch.randint(50, (rows,)), cache) for _ in range(steps)])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_gives_the_logits_of_an_uncompiled_step(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SLOTS", 8)
    plain, compiled = build(kind), build(kind)
    compiled.compile_decoding(backend="eager")
    # The same products in another order of summation, in fp32.
    torch.testing.assert_close(logits_of(compiled, rows, 12), logits_of(plain, rows, 12), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_gives_the_same_logits_with_one_cache_after_the_other() -> None:
    plain, compiled = build().cuda(), build().cuda()
    compiled.compile_decoding()
    with torch.device("cuda"):
        for steps in (12, 5):
            torch.testing.assert_close(logits_of(compiled, 3, steps), logits_of(plain, 3, steps), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_any_number_of_caches_is_served_by_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "STORAGES", 2)
    plain, compiled = build(n_layer=1).cuda(), build(n_layer=1).cuda()
    compiled.compile_decoding()
    with torch.device("cuda"), torch.inference_mode():
        alive = [(plain.new_cache(1, 40), compiled.new_cache(1, 40)) for _ in range(5)]  # no two at one address
        for one, other in alive:
            for token in (1, 2, 3):
                token_B = torch.tensor([token])
                torch.testing.assert_close(
                    compiled.step(token_B, other), plain.step(token_B, one), rtol=1e-4, atol=1e-4
                )


def test_a_graph_serves_until_the_next_slots_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SLOTS", 8)
    model, counter = build(), CompileCounter()
    model.compile_decoding(backend=counter)
    graphs = []
    for steps in (1, 2, 3, 10):  # from 6 tokens: up to 8 slots, up to 16
        logits_of(model, 1, steps)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2]


def test_prompts_of_any_length_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SLOTS", 16)
    model, counter = build(), CompileCounter()
    model.compile_decoding(backend=counter)
    for length in (1, 3, 7):
        list(
            generate_tokens(model, id_tokenizer(50), [[1] * length], sampler=Sample(temperature=0.0), max_new_tokens=5)
        )
    assert counter.frame_count == 1


def test_generated_tokens_are_the_same() -> None:
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    plain, compiled = build(), build()
    compiled.compile_decoding(backend="eager")
    options: dict[str, Any] = {"sampler": Sample(temperature=0.0), "max_new_tokens": 12}
    expected = [one.tokens for one in generate_tokens(plain, id_tokenizer(50), prompts, **options)]
    assert [one.tokens for one in generate_tokens(compiled, id_tokenizer(50), prompts, **options)] == expected


def test_few_numbers_of_rows_serve_all() -> None:
    model, counter = build(), CompileCounter()
    model.compile_decoding(backend=counter)
    prompts = [[1, 2, 3]] * 7  # which end one after the other
    generator = Generator(model, id_tokenizer(50), rows=7)
    for i, prompt in enumerate(prompts):
        generator.submit(prompt, max_new_tokens=2 + i, sampler=Sample(temperature=0.0))
    generator.run()
    assert counter.frame_count == 4  # 7 (all there are), 4, 2 and 1


def test_there_are_as_many_graphs_as_a_row_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SLOTS", 8)
    model, counter = build(n_layer=1), CompileCounter()
    model.compile_decoding(backend=counter)
    with torch._dynamo.config.patch(recompile_limit=2):  # of a function; torch's own is 8
        logits_of(model, 1, 20)
    assert counter.frame_count == 4  # 6 to 26 tokens: 8, 16, 24 and 32 slots


def test_idle_places_do_not_lengthen_a_step(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(decoding, "SLOTS", 8)
    greedy: dict[str, Any] = {"sampler": Sample(temperature=0.0)}
    short, found = [[i, i + 1] for i in range(3)], []
    for model in (build(n_layer=1), build(n_layer=1)):
        if found:
            model.compile_decoding(backend="eager")
        generator = Generator(model, id_tokenizer(50), rows=4, remember=True)
        for prompt in (*short, [*range(30)]):  # the last place is left with 30 tokens in it
            generator.submit(prompt, max_new_tokens=1, **greedy)
        generator.run()
        with caplog.at_level(logging.INFO, logger=decoding.log.name):
            ids = [generator.submit(prompt, max_new_tokens=4, **greedy) for prompt in short]
            results = generator.run()
        found.append([results[one][0].tokens for one in ids])
        assert generator._pool.likest([*range(30), 7])[1] == 30  # and still holds what it held
        again = generator.submit([*range(30), 7], max_new_tokens=4, **greedy)
        found[-1].append(generator.run()[again][0].tokens)
    assert found[0] == found[1]
    assert "compiling a decoding step of 4 rows over 8 slots" in caplog.messages
    assert not any("4 rows over 32" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "other",
    [
        {"attention": {"kind": "full", "window": 3}},
        {"norm": {"kind": "rmsnorm", "eps": 0.5}},
        {"feedforward": "geglu"},
        {"position": {"kind": "rope", "interleaved": True}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_models_of_equal_shapes_have_their_own_graphs(other: dict[str, Any]) -> None:
    for options in ({}, other):
        plain, compiled = build(n_layer=1, **options), build(n_layer=1, **options)
        compiled.compile_decoding(backend="eager")
        torch.testing.assert_close(logits_of(compiled, 1, 2), logits_of(plain, 1, 2), rtol=1e-4, atol=1e-4)


def up_of(model: DecoderLM) -> torch.nn.Linear:
    up = model.layers[0].get_submodule("mlp.up_proj")
    assert isinstance(up, torch.nn.Linear)
    return up


def adapt(model: DecoderLM) -> None:
    Attached(model, torch.nn.Module()).linear(up_of(model), lambda x, y: 3 * y)


def test_what_changes_a_model_changes_its_graph() -> None:
    plain, compiled = build(n_layer=1, dropout=0.5), build(n_layer=1, dropout=0.5)
    compiled.compile_decoding(backend="eager")
    changes: list[Callable[[DecoderLM], Any]] = [
        lambda model: model.train(),
        lambda model: model.eval(),
        lambda model: model.layers.__setitem__(0, build(n_layer=1, norm={"kind": "rmsnorm", "eps": 0.5}).layers[0]),
        adapt,
        lambda model: model.adapters[0].detach(),
        lambda model: setattr(up_of(model), "weight", torch.nn.Parameter(2 * up_of(model).weight)),
        lambda model: setattr(up_of(model).weight, "data", 2 * up_of(model).weight.data),  # as averages are swapped in
        lambda model: model.norm.to(torch.bfloat16),
        lambda model: quantize_(model, "int8"),
    ]
    seen = [logits_of(compiled, 1, 2)]
    for change in changes:
        for model in (plain, compiled):
            change(model)
        seen.append(logits_of(compiled, 1, 2))
        if not compiled.training:
            torch.testing.assert_close(seen[-1], logits_of(plain, 1, 2), rtol=0.02, atol=0.02)  # int8 rounds inputs
        assert not torch.equal(seen[-1], seen[-2])


def replacing(update: Callable[..., Any]) -> Callable[..., Any]:
    """`KVCache.update` of a cache that does not write in place."""

    def anew(self: KVCache, *args: Any) -> Any:
        self.k_BHSE, self.v_BHSE = self.k_BHSE.clone(), self.v_BHSE.clone()
        return update(self, *args)

    return anew


def test_states_that_a_step_replaces_are_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "update", replacing(KVCache.update))
    plain, compiled = build(), build()
    compiled.compile_decoding(backend="eager")
    torch.testing.assert_close(logits_of(compiled, 2, 5), logits_of(plain, 2, 5), rtol=1e-4, atol=1e-4)


def test_a_step_knows_the_precision_it_is_in() -> None:
    plain, compiled = build(), build()
    compiled.compile_decoding(backend="eager")
    rows = native.MOST_ROWS + 1  # more than the operators take, which stay with the weights as they are
    caches = [model.new_cache(rows, 40) for model in (plain, compiled)]
    for enabled in (False, True, False, True):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected, found = (
                model.step(torch.ones(rows).long(), cache)
                for model, cache in zip((plain, compiled), caches, strict=True)
            )
        assert found.dtype == expected.dtype == (torch.bfloat16 if enabled else torch.float32)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1 if enabled else 0.05)


def test_a_copy_of_a_model_computes_with_its_own_weights() -> None:
    model = build(n_layer=1)
    model.compile_decoding(backend="eager")
    before = logits_of(model, 1, 2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    plain = build(n_layer=1)
    plain.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits_of(other, 1, 2), logits_of(plain, 1, 2), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(model, 1, 2), before)


def test_a_model_that_is_not_one_graph_is_refused() -> None:
    model = build(n_layer=1)
    model.layers[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    model.compile_decoding(backend="eager")
    with pytest.raises(UserError, match=r"this model is not one graph .* decode without compiling"):
        logits_of(model, 1, 1)


def linear_calls() -> dict[str, tuple[Any, ...]]:
    x, weight = torch.randn(2, 1, 8), torch.randn(5, 8)
    return {
        "many rows": (torch.randn(3, 3, 8), weight),
        "no rows": (torch.randn(0, 8), weight),
        "one vector": (x[0, 0], weight),
        "a weight that is a vector": (x, weight[0]),
        "a weight turned over": (x, torch.randn(8, 5).T),
        "float64": (x.double(), weight.double()),
        "a bias": (x, weight, torch.randn(5)),
    }


@pytest.mark.parametrize("kind", linear_calls())
@pytest.mark.skipif(not native.load(), reason="there are no native operators")
def test_any_product_of_a_layer_is_computed(kind: str) -> None:
    torch.manual_seed(0)
    x, weight, *bias = linear_calls()[kind]
    ways = [
        lambda: F.linear(x, weight, *bias),
        lambda: F.linear(input=x, weight=weight, **({"bias": bias[0]} if bias else {})),
    ]
    with FewRows():
        found = [way() for way in ways]
    for y in found:
        torch.testing.assert_close(y, ways[0](), rtol=1e-4, atol=1e-4)


def attention_calls() -> dict[str, dict[str, Any]]:
    mask = torch.randn(2, 1, 3, 7)
    return {
        "nothing": {},
        "a mask": {"attn_mask": mask},
        "a mask and a scale": {"attn_mask": mask, "scale": 0.1},
        "a mask of booleans": {"attn_mask": mask > 0},
        "a mask of one column": {"attn_mask": mask[..., :1]},
        "a mask turned over": {"attn_mask": torch.randn(7, 3).T},
        "no future": {"is_causal": True},
    }


@pytest.mark.parametrize("width", [32, 40])
@pytest.mark.parametrize("kind", attention_calls())
@pytest.mark.skipif(not native.load(), reason="there are no native operators")
def test_any_attention_of_a_layer_is_computed(kind: str, width: int) -> None:
    torch.manual_seed(0)
    options = attention_calls()[kind]
    q, k, v = torch.randn(2, 4, 3, width), torch.randn(2, 4, 7, width), torch.randn(2, 4, 7, width)
    for qkv in ((q, k, v), (q[0], k[0], v[0]), (q, k[:, :1], v[:, :1]), (q, k.mT.contiguous().mT, v)):
        shared = qkv[0].dim() == 3 and "attn_mask" in options
        own = options | ({"attn_mask": options["attn_mask"].broadcast_to(2, 1, 3, 7)[0]} if shared else {})
        with FewRows():
            found = F.scaled_dot_product_attention(*qkv, **own)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(*qkv, **own), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["fp32", "int8", "int4"])
@pytest.mark.skipif(not native.load(), reason="there are no native operators")
def test_a_step_is_made_of_native_operators(form: str) -> None:
    if form == "int4" and not native.has_int4:
        pytest.skip(NO_INT4)
    called: list[str] = []
    model = build("wide")
    if form != "fp32":
        quantize_(model, form)

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    model.compile_decoding(backend=backend)
    logits_of(model, 1, 1)
    assert sum("few_queries" in name for name in called) == 1
    product = "few_rows_int4" if form == "int4" else "few_rows"
    assert sum(name.endswith(product) for name in called) == 8  # q, k, v, o; gate, up, down; the head


def dequantised(model: DecoderLM) -> DecoderLM:
    """The same weights in float64, multiplied by torch."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                plain = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                plain.weight.data = child.weight
                if child.bias is not None:
                    plain.bias.data = child.bias
                setattr(parent, name, plain)
    return model.double().requires_grad_(False)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantised_weights_are_decoded_in_a_graph(form: str) -> None:
    compiled, exact = build(), build()
    for model in (compiled, exact):
        quantize_(model, form)
    expected = logits_of(dequantised(exact), 3, 4)
    compiled.compile_decoding(backend="eager")
    # Rows are rounded to bf16 in front of every layer; a wrong product would be of the size of the logits.
    assert (logits_of(compiled, 3, 4).double() - expected).abs().max() < 0.05 * expected.abs().max()


def products(form: str, x: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Of what the same rows are multiplied by in three layers, each with a view of its own, then of other rows."""
    with FewRows():
        rows = [x.reshape(-1, 64) for _ in range(3)] + [x.reshape(-1, 64) * 2]
        if form == "int8":
            return [
                torch.ops.aten._weight_int8pack_mm(row, *tensors[i : i + 2])
                for row, i in zip(rows, (0, 2, 4, 0), strict=True)
            ]
        if form == "int4":
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
            pairs = [tensors[i : i + 2] for i in (0, 2, 4, 0)]
            return [multiply(row, codes, 32, scales) for row, (codes, scales) in zip(rows, pairs, strict=True)]
        return [F.linear(row, tensors[i]) for row, i in zip(rows, (0, 1, 2, 0), strict=True)]


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
@pytest.mark.skipif(not native.load(), reason="there are no native operators")
def test_products_of_the_same_rows_are_joined(form: str) -> None:
    if form == "int4" and not native.has_int4:
        pytest.skip(NO_INT4)
    torch.manual_seed(0)
    linears = [torch.nn.Linear(64, n, bias=False) for n in (40, 70, 33)]
    if form == "bf16":
        tensors = [linear.weight.detach().bfloat16() for linear in linears]
    else:
        layers = [{"int8": Int8Linear, "int4": Int4Linear}[form](linear) for linear in linears]
        tensors = [tensor for layer in layers for tensor in (layer.codes, layer.scales)]
    x = torch.randn(2, 1, 64).bfloat16()
    graph = make_fx(partial(products, form))(x, *tensors)
    expected = graph(x, *tensors)
    Join()(graph.graph)
    graph.recompile()
    assert sum("few_rows" in str(node.target) for node in graph.graph.nodes) == 2
    for found, y in zip(graph(x, *tensors), expected, strict=True):
        assert torch.equal(found, y)


@needs_compiler
@pytest.mark.parametrize(("form", "rows"), [("bf16", 1), ("bf16", 3), ("int8", 2), ("int4", 3)])
def test_inductor_multiplies_few_rows(form: str, rows: int) -> None:
    compiled, exact = build(n_layer=1), build(n_layer=1)
    if form != "bf16":
        for model in (compiled, exact):
            quantize_(model, form)
    expected = logits_of(dequantised(exact), rows, 3)
    compiled = compiled.to(torch.bfloat16)
    compiled.compile_decoding()
    error = (logits_of(compiled, rows, 3).double() - expected).abs().max() / expected.abs().max()
    # bf16 rounds weights and activations to 2^-9 each; a wrong product would be of the size of the logits.
    assert error < 0.05


@needs_compiler
def test_inductor_is_given_tokens_as_they_were_compiled() -> None:
    plain, compiled = build(n_layer=1), build(n_layer=1)
    compiled.compile_decoding()
    tokens_BT = torch.randint(50, (3, 4))
    caches = [model.new_cache(3, 40) for model in (plain, compiled)]
    with torch.inference_mode():
        for tokens_B in (tokens_BT[:, 0].clone(), tokens_BT[:, 1], tokens_BT[:, 2].int()):
            expected = plain.step(tokens_B.long(), caches[0])
            torch.testing.assert_close(compiled.step(tokens_B, caches[1]), expected, rtol=1e-4, atol=1e-4)


def test_a_cache_laid_out_otherwise_has_a_graph_of_its_own() -> None:
    model, counter = build(n_layer=1), CompileCounter()
    model.compile_decoding(backend=counter)
    cache = model.new_cache(2, 40)
    model.step(torch.ones(2).long(), cache)
    for state in cache.states:
        assert isinstance(state, KVCache)
        state.k_BHSE = state.k_BHSE.mT.contiguous().mT
    model.step(torch.ones(2).long(), cache)
    assert counter.frame_count == 2


def test_as_many_tokens_as_rows_are_asked_for() -> None:
    model = build(n_layer=1)
    model.compile_decoding(backend="eager")
    for rows in (2, 4):
        with pytest.raises(ValueError, match=f"there are 3 tokens and the cache has {rows} rows"):
            model.step(torch.ones(3).long(), model.new_cache(rows, 40))


@pytest.mark.parametrize("stays", ["in place", "replaced"])
def test_a_model_that_is_gone_leaves_nothing(stays: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if stays == "replaced":
        monkeypatch.setattr(KVCache, "update", replacing(KVCache.update))
    model = build(n_layer=1)
    model.compile_decoding(backend="eager")
    logits_of(model, 1, 3)
    left = [weakref.ref(model), weakref.ref(model.embed_tokens.weight)]
    del model
    gc.collect()
    assert [one() for one in left] == [None, None]


def test_what_changes_an_adapter_changes_the_graph() -> None:
    plain, compiled = build(n_layer=1), build(n_layer=1)
    compiled.compile_decoding(backend="eager")
    modules = []
    for model in (plain, compiled):
        module = torch.nn.Linear(32, up_of(model).out_features).requires_grad_(False)
        module.load_state_dict({name: torch.ones_like(x) for name, x in module.state_dict().items()})
        Attached(model, module).linear(up_of(model), lambda x, y, module=module: y + module(x))  # type: ignore[misc]
        modules.append(module)
    seen = [logits_of(compiled, 1, 2)]
    for module in modules:
        module.weight = torch.nn.Parameter(3 * module.weight, requires_grad=False)
    seen.append(logits_of(compiled, 1, 2))
    torch.testing.assert_close(seen[1], logits_of(plain, 1, 2), rtol=1e-4, atol=1e-4)
    assert not torch.equal(*seen)


def test_a_full_cache_is_told_in_one_line() -> None:
    model = build()
    model.compile_decoding(backend="eager")
    with pytest.raises(ValueError, match="room for 64 tokens per row"):
        logits_of(model, 1, 59)


def test_key_value_prefixes_are_refused() -> None:
    model = build()
    model.compile_decoding(backend="eager")
    model.context_hooks.append(lambda ctx: None)
    with pytest.raises(UserError, match="knows no key/value prefixes"):
        logits_of(model, 1, 1)
