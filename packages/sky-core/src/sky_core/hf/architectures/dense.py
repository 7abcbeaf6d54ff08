"""Llama and its relatives without experts: Mistral, Qwen2, Qwen3, OLMo 2, Gemma 2."""

from __future__ import annotations

from typing import ClassVar

from sky_core.components.model import Decoder
from sky_core.hf.architectures.base import (
    GATED,
    Architecture,
    Table,
    act_of,
    biased,
    body,
    body_config,
    full,
    rms,
    rms_config,
    tiled,
)
from sky_core.hf.config import Config
from sky_core.hf.rope import read_rope, write_rope

SLIDING, FULL = "sliding_attention", "full_attention"


def gated(c: Config, key: str = "hidden_act", default: str = "silu") -> Table:
    return {**c.choice(key, GATED, default), "d_ff": c.number("intermediate_size")}


def gated_config(decoder: Decoder, key: str = "hidden_act") -> Table:
    part = decoder.feedforward[0]
    return {key: act_of(part, GATED, "silu"), "intermediate_size": getattr(part, "d_ff", None)}


def rope(c: Config) -> Table:
    position, length = read_rope(c, c.number("max_position_embeddings"))
    return {"position": position, "max_length": length}


def layer_windows(c: Config, default: list[str], window: int | None) -> list[int | None]:
    """The window of each layer, by `layer_types`."""
    types = c.take("layer_types", default)
    if not isinstance(types, list) or len(types) != len(default) or not {*types} <= {SLIDING, FULL}:
        raise c.refused("layer_types", types, f"{len(default)} times {SLIDING} or {FULL} is computed here")
    if window is None and SLIDING in types:
        raise c.refused("layer_types", types, "there is no sliding_window for them")
    return [window if kind == SLIDING else None for kind in types]


def window_config(decoder: Decoder) -> Table:
    """`layer_types` and the one window of the layers that have one."""
    windows = [getattr(one, "window", None) for one in decoder.attention]
    return {
        "sliding_window": next(filter(None, windows), None),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


class Llama(Architecture):
    """Llama 1 to 3.3 (arXiv:2407.21783), and everything that calls itself so."""

    model_type: ClassVar = "llama"
    class_name: ClassVar = "LlamaForCausalLM"

    def to_model(self, c: Config) -> Table:
        return {
            **body(c),
            **rope(c),
            "attention": full(bias=c.flag("attention_bias", False)),
            "feedforward": gated(c),
            "bias": c.flag("mlp_bias", False),
            "norm": rms(c),
        }

    def to_config(self, decoder: Decoder) -> Table:
        return {
            **body_config(decoder),
            **write_rope(decoder),
            **gated_config(decoder),
            **rms_config(decoder),
            "attention_bias": biased(decoder),
            "mlp_bias": decoder.bias,
        }


class Mistral(Architecture):
    """Llama with a window over all layers or none (arXiv:2310.06825)."""

    model_type: ClassVar = "mistral"
    class_name: ClassVar = "MistralForCausalLM"

    def to_model(self, c: Config) -> Table:
        return {
            **body(c),
            **rope(c),
            "attention": full(window=c.number("sliding_window", None)),
            "feedforward": gated(c),
            "norm": rms(c),
        }

    def to_config(self, decoder: Decoder) -> Table:
        window = window_config(decoder)["sliding_window"]
        return {
            **body_config(decoder),
            **write_rope(decoder),
            **gated_config(decoder),
            **rms_config(decoder),
            "sliding_window": window,
        }


class Qwen2(Architecture):
    """Llama with biases in q, k and v, and a window over the layers from `max_window_layers` on (arXiv:2407.10671)."""

    model_type: ClassVar = "qwen2"
    class_name: ClassVar = "Qwen2ForCausalLM"
    default_head_dim: ClassVar[int | None] = None

    def to_model(self, c: Config) -> Table:
        shape = body(c, head_dim=self.default_head_dim)
        used, window = c.flag("use_sliding_window", False), c.number("sliding_window", None)
        first = c.number("max_window_layers", 28, least=0)
        own = window if used else None
        types = [SLIDING if own is not None and i >= first else FULL for i in range(shape["n_layer"])]
        bias = self.attention_bias(c)
        return {
            **shape,
            **rope(c),
            "attention": tiled([full(**bias, window=one) for one in layer_windows(c, types, own)]),
            "feedforward": gated(c),
            "norm": rms(c),
        }

    def attention_bias(self, c: Config) -> dict[str, bool]:
        return {"bias": True, "out_bias": False}

    def to_config(self, decoder: Decoder) -> Table:
        window = window_config(decoder)
        return {
            **body_config(decoder),
            **write_rope(decoder),
            **gated_config(decoder),
            **rms_config(decoder),
            **window,
            "use_sliding_window": window["sliding_window"] is not None,
            "max_window_layers": [*window["layer_types"], SLIDING].index(SLIDING),
        }


class Qwen3(Qwen2):
    """Llama with norms of each head of q and k (arXiv:2505.09388)."""

    model_type: ClassVar = "qwen3"
    class_name: ClassVar = "Qwen3ForCausalLM"
    default_head_dim: ClassVar = 128

    def to_model(self, c: Config) -> Table:
        return {**super().to_model(c), "qk_norm": "head"}

    def attention_bias(self, c: Config) -> dict[str, bool]:
        return {"bias": c.flag("attention_bias", False)}

    def to_config(self, decoder: Decoder) -> Table:
        return {**super().to_config(decoder), "attention_bias": biased(decoder)}


class Olmo2(Architecture):
    """Norms behind the branches, and over all heads of q and k together (arXiv:2501.00656)."""

    model_type: ClassVar = "olmo2"
    class_name: ClassVar = "Olmo2ForCausalLM"

    def to_model(self, c: Config) -> Table:
        return {
            **body(c),
            **rope(c),
            "block": "reordered",
            "qk_norm": "full",
            "attention": full(bias=c.flag("attention_bias", False)),
            "feedforward": gated(c),
            "norm": rms(c, 1e-5),
        }

    def to_config(self, decoder: Decoder) -> Table:
        return {
            **body_config(decoder),
            **write_rope(decoder),
            **gated_config(decoder),
            **rms_config(decoder),
            "attention_bias": biased(decoder),
        }


class Gemma2(Architecture):
    """Windows in every other layer, bounded scores and logits, norms on both sides of a branch (arXiv:2408.00118)."""

    model_type: ClassVar = "gemma2"
    class_name: ClassVar = "Gemma2ForCausalLM"
    harmless: ClassVar = frozenset({"hidden_act"})  # hidden_activation is what counts

    def to_model(self, c: Config) -> Table:
        shape = body(c, head_dim=256, tied=True)
        types = [FULL if i % 2 else SLIDING for i in range(shape["n_layer"])]
        scalar = c.number("query_pre_attn_scalar", 256)
        options = {
            "bias": c.flag("attention_bias", False),
            "softcap": c.real("attn_logit_softcapping", None),
            "scale": None if scalar == shape["head_dim"] else scalar**-0.5,
        }
        windows = layer_windows(c, types, c.number("sliding_window", 4096))
        return {
            **shape,
            **rope(c),
            "block": "sandwich",
            "scale_embeddings": True,
            "logit_softcap": c.real("final_logit_softcapping", None),
            "attention": tiled([full(window=window, **options) for window in windows]),
            "feedforward": gated(c, "hidden_activation", "gelu_pytorch_tanh"),
            "norm": {**rms(c), "gain": "zero"},
        }

    def to_config(self, decoder: Decoder) -> Table:
        layer = decoder.attention[0]
        scale = getattr(layer, "scale", None)
        window = window_config(decoder)
        return {
            **body_config(decoder),
            **write_rope(decoder),
            **gated_config(decoder, "hidden_activation"),
            **rms_config(decoder),
            **window,
            "sliding_window": window["sliding_window"] or 4096,
            "attention_bias": biased(decoder),
            "attn_logit_softcapping": getattr(layer, "softcap", None),
            "final_logit_softcapping": decoder.logit_softcap,
            "query_pre_attn_scalar": decoder.head_dim if scale is None else max(round(scale**-2), 1),
        }
