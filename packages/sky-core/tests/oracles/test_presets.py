"""Presets have, group by group, the parameters of the same model in transformers, and are as its config is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sky_core.config import read_run_or_preset
from sky_core.hf.table import model_table

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
    "gpt-neox-20b": ("GPTNeoXConfig", {"hidden_act": "gelu_pytorch_tanh"}),  # published as gelu_fast, the same function
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
    "llama-3.1-8b": (
        "LlamaConfig",
        LLAMA3
        | {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
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
            "norm_topk_prob": True,
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
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            "max_position_embeddings": 163840,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
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
def test_the_model_is_that_of_the_published_config(name: str, tmp_path: Path) -> None:
    ours = model_of(name)
    config_of(name).save_pretrained(tmp_path)
    theirs = type(ours).model_validate(without_kind(model_table(tmp_path)[1]))
    assert spelled_out(ours) == spelled_out(theirs)


def without_kind(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != "kind"}


def spelled_out(model: Any) -> dict[str, Any]:
    """Every layer's options with defaults filled in, without those that only matter to training."""
    table = model.as_dict()
    table |= {"n_kv_head": model.n_kv_head or model.n_head, "head_dim": model.width_of_head}
    layers = [
        (model.attention[i % len(model.attention)], model.feedforward[i % len(model.feedforward)])
        for i in range(model.n_layer)
    ]
    table["attention"] = [one.as_dict() for one, _ in layers]
    for attention in table["attention"]:
        if attention["kind"] == "full":
            attention |= {key: model.bias for key in ("bias", "out_bias") if attention[key] is None}
    table["feedforward"] = []
    for i, (_, part) in enumerate(layers):
        options = part.as_dict()
        if part.kind == "moe" and i < part.dense_layers:
            options = {"kind": "swiglu", "d_ff": part.d_ff_dense}
        options["d_ff"] = options["d_ff"] or 4 * model.d_model
        training = {"aux_loss", "z_loss", "bias_update", "dense_layers", "d_ff_dense"}
        table["feedforward"].append({key: value for key, value in options.items() if key not in training})
    return {key: value for key, value in table.items() if key not in ("dropout", "initializer_range")}
