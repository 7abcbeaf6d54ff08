"""GPT-2 and GPT-NeoX (Pythia): biases everywhere, LayerNorm, q, k and v as one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sky_core.components.model import Decoder
from sky_core.hf.architectures.base import PLAIN, Architecture, Table, act_of, biased, full
from sky_core.hf.config import Config, words
from sky_core.hf.keys import FUSED_TRANSPOSED, TRANSPOSED, Rule, fused_by_head
from sky_core.hf.rope import read_rope, write_rope

QKV = "layers.{l}.self_attn.q_proj.{w} layers.{l}.self_attn.k_proj.{w} layers.{l}.self_attn.v_proj.{w}"


class GPT2(Architecture):
    """Learned positions; matrices are kept (in, out) (Radford et al. 2019)."""

    model_type: ClassVar = "gpt2"
    class_name: ClassVar = "GPT2LMHeadModel"
    prefix: ClassVar = "transformer."
    ignored: ClassVar = (r"transformer\.h\.\d+\.attn\.(masked_)?bias",)
    harmless: ClassVar = words("""
        n_ctx attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn
        summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    """)

    def to_model(self, c: Config) -> Table:
        c.only("scale_attn_weights", True)
        c.only("scale_attn_by_inverse_layer_idx", False)
        d_model = c.number("n_embd")
        return {
            "n_layer": c.number("n_layer"),
            "n_head": c.number("n_head"),
            "d_model": d_model,
            "max_length": c.number("n_positions"),
            "vocab_size": c.number("vocab_size"),
            "tie_embeddings": c.flag("tie_word_embeddings", True),
            "initializer_range": c.real("initializer_range", 0.02) or 0.02,
            "bias": True,
            "position": "learned",
            "attention": full(bias=True),
            "feedforward": {
                **c.choice("activation_function", PLAIN, "gelu_new"),
                "d_ff": c.number("n_inner", 4 * d_model),
            },
            "norm": {"kind": "layernorm", "eps": c.real("layer_norm_epsilon", 1e-5)},
        }

    def to_config(self, decoder: Decoder) -> Table:
        part = decoder.feedforward[0]
        return {
            "n_layer": decoder.n_layer,
            "n_head": decoder.n_head,
            "n_embd": decoder.d_model,
            "n_positions": decoder.max_length,
            "n_inner": getattr(part, "d_ff", None),
            "activation_function": act_of(part, {"gelu_new": PLAIN["gelu_new"], **PLAIN}, "gelu_new"),
            "layer_norm_epsilon": getattr(decoder.norm, "eps", 1e-5),
        }

    def rules(self, decoder: Decoder) -> Sequence[Rule]:
        ours, theirs = "layers.{l}.", "transformer.h.{l}."
        return [
            Rule("embed_tokens.weight", "transformer.wte.weight"),
            Rule("positions.0.embed_positions.weight", "transformer.wpe.weight"),
            Rule(ours + "input_layernorm.{w}", theirs + "ln_1.{w}"),
            Rule(QKV, theirs + "attn.c_attn.{w}", FUSED_TRANSPOSED),
            Rule(ours + "self_attn.o_proj.{w}", theirs + "attn.c_proj.{w}", TRANSPOSED),
            Rule(ours + "post_attention_layernorm.{w}", theirs + "ln_2.{w}"),
            Rule(ours + "mlp.up_proj.{w}", theirs + "mlp.c_fc.{w}", TRANSPOSED),
            Rule(ours + "mlp.down_proj.{w}", theirs + "mlp.c_proj.{w}", TRANSPOSED),
            Rule("norm.{w}", "transformer.ln_f.{w}"),
            Rule("lm_head.weight", "lm_head.weight"),
        ]


class GPTNeoX(Architecture):
    """A part of each head turned, attention and feed-forward part side by side (arXiv:2204.06745)."""

    model_type: ClassVar = "gpt_neox"
    class_name: ClassVar = "GPTNeoXForCausalLM"
    prefix: ClassVar = "gpt_neox."
    ignored: ClassVar = (r"(.*\.)?rotary_emb\.inv_freq", r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias")
    renamed: ClassVar = {"lm_head.weight": "embed_out.weight"}

    def to_model(self, c: Config) -> Table:
        position, length = read_rope(c, c.number("max_position_embeddings"), fraction=0.25)
        return {
            "n_layer": c.number("num_hidden_layers"),
            "n_head": c.number("num_attention_heads"),
            "d_model": c.number("hidden_size"),
            "max_length": length,
            "vocab_size": c.number("vocab_size"),
            "tie_embeddings": c.flag("tie_word_embeddings", False),
            "initializer_range": c.real("initializer_range", 0.02) or 0.02,
            "bias": True,
            "block": "parallel" if c.flag("use_parallel_residual", True) else "pre",
            "position": position,
            "attention": full(bias=c.flag("attention_bias", True)),
            "feedforward": {**c.choice("hidden_act", PLAIN, "gelu"), "d_ff": c.number("intermediate_size")},
            "norm": {"kind": "layernorm", "eps": c.real("layer_norm_eps", 1e-5)},
        }

    def to_config(self, decoder: Decoder) -> Table:
        part = decoder.feedforward[0]
        return {
            "num_hidden_layers": decoder.n_layer,
            "num_attention_heads": decoder.n_head,
            "hidden_size": decoder.d_model,
            **write_rope(decoder, fraction=True),
            "intermediate_size": getattr(part, "d_ff", None),
            "hidden_act": act_of(part, PLAIN, "gelu"),
            "attention_bias": biased(decoder),
            "use_parallel_residual": decoder.block.kind == "parallel",
            "layer_norm_eps": getattr(decoder.norm, "eps", 1e-5),
        }

    def rules(self, decoder: Decoder) -> Sequence[Rule]:
        ours, theirs = "layers.{l}.", "gpt_neox.layers.{l}."
        return [
            Rule("embed_tokens.weight", "gpt_neox.embed_in.weight"),
            Rule(QKV, theirs + "attention.query_key_value.{w}", fused_by_head(decoder.n_head)),
            Rule(ours + "self_attn.o_proj.{w}", theirs + "attention.dense.{w}"),
            Rule(ours + "mlp.up_proj.{w}", theirs + "mlp.dense_h_to_4h.{w}"),
            Rule(ours + "mlp.down_proj.{w}", theirs + "mlp.dense_4h_to_h.{w}"),
            Rule(ours + "{w}", theirs + "{w}"),
            Rule("norm.{w}", "gpt_neox.final_layer_norm.{w}"),
            Rule("lm_head.weight", "embed_out.weight"),
        ]
