"""Presets have, group by group, the parameters of the same model in transformers, and the options of its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sky_core.config import read_run_or_preset

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

FOLDER = Path(__file__).parents[4] / "recipes" / "models"
MLA = f"plugins=[{Path(__file__).parents[1] / 'mla_plugin.py'}]"

LLAMA3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-124m": ("GPT2Config", {}),
    "gpt-neox-20b": ("GPTNeoXConfig", {}),
    "pythia-160m": (
        "GPTNeoXConfig",
        {
            "vocab_size": 50304,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    ),
    "llama-3-8b": ("LlamaConfig", LLAMA3),
    "mistral-7b": ("MistralConfig", {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5}),
    "qwen3-0.6b": (
        "Qwen3Config",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        {
            "num_hidden_layers": 48,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "olmo2-7b": (
        "Olmo2Config",
        {
            "vocab_size": 100352,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "gemma-2-2b": ("Gemma2Config", {}),
    "mixtral-8x7b": ("MixtralConfig", {"max_position_embeddings": 32768}),
    "deepseek-v3": ("DeepseekV3Config", {"max_position_embeddings": 163840}),
}
"""Where the class's defaults are the published config, nothing is repeated."""

pytestmark = pytest.mark.usefixtures("sky_sandbox")


def config_of(name: str) -> Any:
    kind, options = CONFIGS[name]
    return getattr(transformers, kind)(**options)


def model_of(name: str) -> Any:
    return read_run_or_preset(FOLDER / f"{name}.yaml", [MLA] if name == "deepseek-v3" else []).model


def numbers(module: torch.nn.Module, *parts: str) -> int:
    """Parameters whose names have one of these words; all without."""
    named = module.named_parameters()
    return sum(tensor.numel() for name, tensor in named if not parts or any(part in name for part in parts))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parameters_are_those_of_transformers(name: str) -> None:
    with torch.device("meta"):
        ours = model_of(name).build(1)
        theirs = transformers.AutoModelForCausalLM.from_config(config_of(name))
    assert numbers(ours) == numbers(theirs)
    assert numbers(ours, "norm") == numbers(theirs, "norm", "ln_")
    assert numbers(ours, ".self_attn.") - numbers(ours, "q_norm", "k_norm") == numbers(
        theirs, ".self_attn.", ".attn.", ".attention."
    ) - numbers(theirs, "q_norm", "k_norm")
    assert numbers(ours, ".mlp.") == numbers(theirs, ".mlp.", ".block_sparse_moe.")
    assert numbers(ours, "embed_tokens") == numbers(theirs, "embed_tokens", "embed_in", "wte")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_options_are_those_of_the_published_config(name: str) -> None:
    ours, theirs = model_of(name), config_of(name)
    assert ours.max_length == theirs.max_position_embeddings
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    eps = [
        getattr(theirs, key) for key in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps") if hasattr(theirs, key)
    ]
    assert ours.norm.eps == eps[0]
    if name == "gpt2-124m":
        assert ours.dropout == theirs.resid_pdrop == theirs.embd_pdrop == theirs.attn_pdrop
    else:
        assert ours.position[0].theta == theirs.rope_parameters["rope_theta"]
        assert ours.position[0].fraction == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    if getattr(theirs, "layer_types", None):
        kinds = ["full_attention" if one.window is None else "sliding_attention" for one in ours.attention]
        assert kinds * (ours.n_layer // len(kinds)) == theirs.layer_types
    if getattr(theirs, "sliding_window", None):
        assert ours.attention[0].window == theirs.sliding_window


def test_gemmas_bounds_and_scale_are_those_of_the_published_config() -> None:
    ours, theirs = model_of("gemma-2-2b"), config_of("gemma-2-2b")
    assert ours.logit_softcap == theirs.final_logit_softcapping
    assert {one.softcap for one in ours.attention} == {theirs.attn_logit_softcapping}
    assert ours.width_of_head == theirs.query_pre_attn_scalar


@pytest.mark.parametrize(
    ("name", "option", "key"),
    [
        ("mixtral-8x7b", "n_experts", "num_local_experts"),
        ("mixtral-8x7b", "top_k", "num_experts_per_tok"),
        ("qwen3-30b-a3b", "top_k", "num_experts_per_tok"),
        ("qwen3-30b-a3b", "aux_loss", "router_aux_loss_coef"),
        ("deepseek-v3", "top_k", "num_experts_per_tok"),
        ("deepseek-v3", "n_groups", "n_group"),
        ("deepseek-v3", "top_groups", "topk_group"),
        ("deepseek-v3", "routed_scale", "routed_scaling_factor"),
        ("deepseek-v3", "norm_topk", "norm_topk_prob"),
        ("deepseek-v3", "dense_layers", "first_k_dense_replace"),
    ],
)
def test_routing_is_that_of_the_published_config(name: str, option: str, key: str) -> None:
    assert getattr(model_of(name).feedforward[0], option) == getattr(config_of(name), key)


def test_llama_31_is_stretched_as_published() -> None:
    scaling = model_of("llama-3.1-8b").position[0].scaling
    published = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}
    assert scaling.model_dump() == {"kind": "llama3", **published}
