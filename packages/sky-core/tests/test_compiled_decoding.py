"""Decoding compiled as one graph gives what decoding uncompiled gives."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sky_core.bench.shape import id_tokenizer
from sky_core.components.generation import Sample
from sky_core.components.model import Decoder
from sky_core.errors import UserError
from sky_core.generation.decode import generate_tokens
from sky_core.generation.generator import Generator
from sky_core.model import decoding
from sky_core.model.decoder import DecoderLM
from sky_core.model.norm import RMSNorm
from sky_core.quantization import quantize_

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
}


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
    torch._dynamo.reset()
    plain, compiled = build(kind), build(kind)
    compiled.compile_decoding(backend="eager")
    # The same products in another order of summation, in fp32.
    torch.testing.assert_close(logits_of(compiled, rows, 12), logits_of(plain, rows, 12), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_gives_the_same_logits_with_one_cache_after_the_other() -> None:
    torch._dynamo.reset()
    plain, compiled = build().cuda(), build().cuda()
    compiled.compile_decoding()
    with torch.device("cuda"):
        for steps in (12, 5):
            torch.testing.assert_close(logits_of(compiled, 3, steps), logits_of(plain, 3, steps), rtol=1e-4, atol=1e-4)


def test_a_graph_serves_until_the_next_slots_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SLOTS", 8)
    torch._dynamo.reset()
    model, counter = build(), CompileCounter()
    model.compile_decoding(backend=counter)
    graphs = []
    for steps in (1, 2, 3, 10):  # from 6 tokens: up to 8 slots, up to 16
        logits_of(model, 1, steps)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2]


def test_generated_tokens_are_the_same() -> None:
    torch._dynamo.reset()
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    plain, compiled = build(), build()
    compiled.compile_decoding(backend="eager")
    options: dict[str, Any] = {"sampler": Sample(temperature=0.0), "max_new_tokens": 12}
    expected = [one.tokens for one in generate_tokens(plain, id_tokenizer(50), prompts, **options)]
    assert [one.tokens for one in generate_tokens(compiled, id_tokenizer(50), prompts, **options)] == expected


def test_few_numbers_of_rows_serve_all() -> None:
    torch._dynamo.reset()
    model, counter = build(), CompileCounter()
    model.compile_decoding(backend=counter)
    prompts = [[1, 2, 3]] * 7  # which end one after the other
    generator = Generator(model, id_tokenizer(50), rows=7)
    for i, prompt in enumerate(prompts):
        generator.submit(prompt, max_new_tokens=2 + i, sampler=Sample(temperature=0.0))
    generator.run()
    assert counter.frame_count == 4  # 7 (all there are), 4, 2 and 1


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantised_weights_are_decoded_in_a_graph(form: str) -> None:
    torch._dynamo.reset()
    plain, compiled = build(), build()
    for model in (plain, compiled):
        quantize_(model, form)
    compiled.compile_decoding(backend="eager")
    torch.testing.assert_close(logits_of(compiled, 1, 4), logits_of(plain, 1, 4), rtol=0.02, atol=0.02)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_multiplies_one_row_in_bf16() -> None:
    torch._dynamo.reset()
    exact = logits_of(build(n_layer=1).double(), 1, 3)
    compiled = build(n_layer=1).to(torch.bfloat16)
    compiled.compile_decoding()
    error = (logits_of(compiled, 1, 3).double() - exact).abs().max() / exact.abs().max()
    # bf16 rounds weights and activations to 2^-9 each; a wrong product would be of the size of the logits.
    assert error < 0.05


def test_a_full_cache_is_told_in_one_line() -> None:
    torch._dynamo.reset()
    model = build()
    model.compile_decoding(backend="eager")
    with pytest.raises(ValueError, match="room for 40 tokens per row"):
        logits_of(model, 1, 35)


def test_key_value_prefixes_are_refused() -> None:
    model = build()
    model.compile_decoding(backend="eager")
    model.context_hooks.append(lambda ctx: None)
    with pytest.raises(UserError, match="knows no key/value prefixes"):
        logits_of(model, 1, 1)
