"""Mixtures of experts: Mixtral, Qwen3-MoE, DeepSeek-V3."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

from sky_core.components.layers import SwiGLU
from sky_core.components.model import Decoder
from sky_core.components.moe import MixtureOfExperts
from sky_core.components.position import Rope
from sky_core.hf.architectures.base import (
    LLAMA_RULES,
    Architecture,
    Table,
    biased,
    body,
    body_config,
    first,
    full,
    rms,
    rms_config,
    tiled,
)
from sky_core.hf.architectures.dense import rope, window_config
from sky_core.hf.config import Config, words
from sky_core.hf.keys import STACKED, Rule
from sky_core.hf.rope import read_rope, write_rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}

EXPERT_RULES = [
    Rule("layers.{l}.mlp.experts.{w}", "model.layers.{l}.mlp.experts.{x}.{w}.weight", STACKED),
    *LLAMA_RULES,
]


def experts_config(decoder: Decoder) -> tuple[MixtureOfExperts, list[int]]:
    """The experts of the first layer that has any, and the layers without."""
    found: MixtureOfExperts = first(decoder.feedforward, MixtureOfExperts) or MixtureOfExperts(d_ff=1)
    return found, [i for i, part in enumerate(decoder.feedforward) if not isinstance(part, MixtureOfExperts)]


def dense_width(decoder: Decoder, default: int) -> int:
    """Hidden units of the layers without experts."""
    part = first(decoder.feedforward, SwiGLU)
    return default if part is None else int(part.d_ff)


class Mixtral(Architecture):
    """Experts in every layer, whose weights are normalised over those chosen (arXiv:2401.04088)."""

    model_type: ClassVar = "mixtral"
    class_name: ClassVar = "MixtralForCausalLM"
    harmless: ClassVar = frozenset({"router_jitter_noise"})  # noise of training

    def to_model(self, c: Config) -> Table:
        position, length = read_rope(c, c.number("max_position_embeddings"), theta=1e6)
        return {
            **body(c),
            "position": position,
            "max_length": length,
            "attention": full(window=c.number("sliding_window", None)),
            "feedforward": {
                "kind": "moe",
                "n_experts": c.number("num_local_experts", c.number("num_experts", 8)),
                "top_k": c.number("num_experts_per_tok", 2),
                "d_ff": c.number("intermediate_size"),
                "activation": c.choice("hidden_act", ACTIVATIONS, "silu"),
            },
            "norm": rms(c, 1e-5),
        }

    def to_config(self, decoder: Decoder) -> Table:
        experts, _ = experts_config(decoder)
        return {
            **body_config(decoder),
            **write_rope(decoder),
            **rms_config(decoder),
            "sliding_window": window_config(decoder)["sliding_window"],
            "num_local_experts": experts.n_experts,
            "num_experts_per_tok": experts.top_k,
            "intermediate_size": experts.d_ff,
            "hidden_act": experts.activation if experts.activation in ACTIVATIONS else "silu",
        }

    def rules(self, decoder: Decoder) -> Sequence[Rule]:
        ours, theirs = "layers.{l}.mlp.", "model.layers.{l}.block_sparse_moe."
        names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
        experts = [
            Rule(f"{ours}experts.{name}", f"{theirs}experts.{{x}}.{w}.weight", STACKED) for name, w in names.items()
        ]
        return [*experts, Rule(ours + "gate.weight", theirs + "gate.weight"), *LLAMA_RULES]


class Qwen3Moe(Architecture):
    """Qwen3 with experts, in all layers but those of `mlp_only_layers` (arXiv:2505.09388)."""

    model_type: ClassVar = "qwen3_moe"
    class_name: ClassVar = "Qwen3MoeForCausalLM"
    harmless: ClassVar = frozenset({"max_window_layers"})  # written by Qwen's own files; nothing reads it

    def to_model(self, c: Config) -> Table:
        shape = body(c)
        used, window = c.flag("use_sliding_window", False), c.number("sliding_window", None)
        dense_only, step = c.take("mlp_only_layers", []), c.number("decoder_sparse_step", 1)
        if not isinstance(dense_only, list):
            raise c.refused("mlp_only_layers", dense_only, "a list of layers is needed")
        number = c.number("num_experts", c.number("num_local_experts", 128, least=0), least=0)
        dense = {"kind": "swiglu", "d_ff": c.number("intermediate_size")}
        experts = {
            "kind": "moe",
            "n_experts": number,
            "top_k": c.number("num_experts_per_tok", 8),
            "d_ff": c.number("moe_intermediate_size"),
            "norm_topk": c.flag("norm_topk_prob", False),
        }
        c.only("hidden_act", "silu")
        sparse = [number > 0 and (i + 1) % step == 0 and i not in dense_only for i in range(shape["n_layer"])]
        return {
            **shape,
            **rope(c),
            "qk_norm": "head",
            "attention": full(bias=c.flag("attention_bias", False), window=window if used else None),
            "feedforward": tiled([experts if one else dense for one in sparse]),
            "norm": rms(c),
        }

    def to_config(self, decoder: Decoder) -> Table:
        experts, dense = experts_config(decoder)
        window = window_config(decoder)["sliding_window"]
        return {
            **body_config(decoder),
            **write_rope(decoder),
            **rms_config(decoder),
            "sliding_window": window,
            "use_sliding_window": window is not None,
            "attention_bias": biased(decoder),
            "hidden_act": "silu",
            "num_experts": experts.n_experts,
            "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.d_ff,
            "norm_topk_prob": experts.norm_topk,
            "mlp_only_layers": dense,
            "decoder_sparse_step": 1,
            "intermediate_size": dense_width(decoder, experts.d_ff or 1),
        }

    def rules(self, decoder: Decoder) -> Sequence[Rule]:
        return EXPERT_RULES


class DeepseekV3(Architecture):
    """Latent attention, experts in groups behind a sigmoid router, shared experts (arXiv:2412.19437).

    The attention is a layer of kind `mla`, which a plugin offers. It gets heads of `qk_rope_head_dim` numbers from the
    model: what RoPE turns. Its own norms have eps 1e-6 whatever the model's, so `rms_norm_eps` must be that. The
    modules of multi-token prediction, which files hold as further layers, are left out, as transformers does.
    """

    model_type: ClassVar = "deepseek_v3"
    class_name: ClassVar = "DeepseekV3ForCausalLM"
    harmless: ClassVar = words("""
        aux_loss_alpha seq_aux ep_size num_nextn_predict_layers num_mtp_layers qk_head_dim
    """)

    def to_model(self, c: Config) -> Table:
        c.only("attention_bias", False)
        c.only("hidden_act", "silu")
        c.only("moe_layer_freq", 1)
        c.only("scoring_func", "sigmoid")
        c.only("topk_method", "noaux_tc")
        c.only("rms_norm_eps", 1e-6)
        nope, turned = c.number("qk_nope_head_dim", least=0), c.number("qk_rope_head_dim")
        c.only("head_dim", turned)
        shape = body(c, head_dim=turned)
        if shape["n_kv_head"] != shape["n_head"]:
            raise c.refused(
                "num_key_value_heads", shape["n_kv_head"], "latent attention has num_attention_heads of them"
            )
        both = rope(c)
        both["position"]["interleaved"] = c.flag("rope_interleave", True)
        mla = {
            "kind": "mla",
            "q_lora_rank": c.number("q_lora_rank", None),
            "kv_lora_rank": c.number("kv_lora_rank"),
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": turned,
            "v_head_dim": c.number("v_head_dim"),
        }
        scaling = both["position"].get("scaling", {})
        if scaling.get("mscale_all_dim"):
            mla["scale"] = sharpened((nope + turned) ** -0.5, scaling["factor"], scaling["mscale_all_dim"])
        dense = c.number("first_k_dense_replace", 3, least=0)
        width = c.number("intermediate_size")
        experts = {
            "kind": "moe",
            "router": "sigmoid",
            "n_experts": c.number("n_routed_experts"),
            "top_k": c.number("num_experts_per_tok", 8),
            "d_ff": c.number("moe_intermediate_size"),
            "n_groups": c.number("n_group", 8),
            "top_groups": c.number("topk_group", 4),
            "n_shared": c.number("n_shared_experts", 1),
            "norm_topk": c.flag("norm_topk_prob", True),
            "routed_scale": c.real("routed_scaling_factor", 2.5),
        }
        first_layers = [{"kind": "swiglu", "d_ff": width}] * min(dense, shape["n_layer"])
        return {
            **shape,
            **both,
            "attention": mla,
            "feedforward": tiled([*first_layers, *[experts] * (shape["n_layer"] - len(first_layers))]),
            "norm": rms(c),
        }

    def to_config(self, decoder: Decoder) -> Table:
        mla = decoder.attention[0]
        experts, dense = experts_config(decoder)
        position = decoder.position[0]
        keys = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        shape = {key: getattr(mla, key, None if key == "q_lora_rank" else 1) for key in keys}
        return {
            **body_config(decoder),
            **shape,
            "num_key_value_heads": decoder.n_head,
            "head_dim": shape["qk_rope_head_dim"],
            "rope_interleave": isinstance(position, Rope) and position.interleaved,
            **write_rope(decoder),
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "hidden_act": "silu",
            "first_k_dense_replace": len(dense),
            "intermediate_size": dense_width(decoder, experts.d_ff or 1),
            "n_routed_experts": experts.n_experts,
            "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.d_ff,
            "n_group": experts.n_groups,
            "topk_group": experts.top_groups,
            "n_shared_experts": max(experts.n_shared, 1),
            "norm_topk_prob": experts.norm_topk,
            "routed_scaling_factor": experts.routed_scale,
            "num_nextn_predict_layers": 0,
        }

    def rules(self, decoder: Decoder) -> Sequence[Rule]:
        return EXPERT_RULES

    def not_read(self, decoder: Decoder, names: Iterable[str]) -> tuple[str, ...]:
        layers = (re.fullmatch(r"model\.layers\.(\d+)\.eh_proj\.weight", name) for name in names)
        further = [found[1] for found in layers if found and int(found[1]) >= decoder.n_layer]
        return (*self.ignored, *(rf"model\.layers\.{layer}\..*" for layer in further))


def sharpened(scale: float, factor: float, mscale_all_dim: float) -> float:
    """DeepSeek's scale of scores under YaRN: times (0.1 mscale_all_dim ln(factor) + 1)²."""
    return scale * (0.1 * mscale_all_dim * math.log(factor) + 1) ** 2 if factor > 1 else scale
