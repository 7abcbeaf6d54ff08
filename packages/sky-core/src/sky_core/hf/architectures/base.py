"""What an architecture declares, and what most of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from sky_core.component import Component
from sky_core.components.model import Decoder
from sky_core.hf.config import Config
from sky_core.hf.keys import Rule

Table = dict[str, Any]

GATED: dict[str, Table] = {
    "silu": {"kind": "swiglu"},
    "swish": {"kind": "swiglu"},
    "gelu": {"kind": "geglu"},
    "gelu_pytorch_tanh": {"kind": "geglu", "approximate": "tanh"},
    "gelu_new": {"kind": "geglu", "approximate": "tanh"},
}
PLAIN: dict[str, Table] = {
    "gelu": {"kind": "gelu"},
    "gelu_new": {"kind": "gelu", "approximate": "tanh"},
    "gelu_pytorch_tanh": {"kind": "gelu", "approximate": "tanh"},
    "gelu_fast": {"kind": "gelu", "approximate": "tanh"},
    "relu": {"kind": "relu"},
    "relu2": {"kind": "relu2"},
}
"""`hidden_act` -> feed-forward part, with and without a gate; of several names for one, the first is written."""

LLAMA_RULES = [
    Rule("embed_tokens.weight", "model.embed_tokens.weight"),
    Rule("layers.{l}.{w}", "model.layers.{l}.{w}"),
    Rule("norm.{w}", "model.norm.{w}"),
    Rule("lm_head.weight", "lm_head.weight"),
]
"""Our names are those of Hugging Face's Llama."""


class Architecture(ABC):
    """One architecture of transformers: its config.json and the names of its tensors, both ways.

    `to_model` reads every key that counts; `to_config` need only write what it can: `sky_core.hf.fit` reads that back
    and compares, so a model that the architecture cannot hold is never exported as something near to it.
    """

    model_type: ClassVar[str]
    class_name: ClassVar[str]
    prefix: ClassVar[str] = "model."
    """In front of the names of all tensors but the head's; files of the bare model lack it."""
    ignored: ClassVar[tuple[str, ...]] = (r"(.*\.)?rotary_emb\.inv_freq",)
    """Tensors (regular expressions) that files may hold though they are no weights."""
    renamed: ClassVar[dict[str, str]] = {}
    """Other names that files have -> those that we write."""
    harmless: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def to_model(self, c: Config) -> Table:
        """The `model:` table of a run file."""

    @abstractmethod
    def to_config(self, decoder: Decoder) -> Table:
        """The keys of config.json, those that all architectures share left out.

        The decoder is resolved (`sky_core.hf.fit`): one attention and one feed-forward part for each layer, no width
        or number of heads left to a default.
        """

    def rules(self, decoder: Decoder) -> Sequence[Rule]:
        return LLAMA_RULES

    def not_read(self, decoder: Decoder, names: Iterable[str]) -> tuple[str, ...]:
        """As `ignored`, for a certain model and what its file holds."""
        return self.ignored


def body(c: Config, *, kv_heads: int | None = None, head_dim: int | None = None, tied: bool = False) -> Table:
    """What Llama-like configurations share; the arguments are the architecture's own defaults (None: as without)."""
    n_head, d_model = c.number("num_attention_heads"), c.number("hidden_size")
    return {
        "n_layer": c.number("num_hidden_layers"),
        "n_head": n_head,
        "n_kv_head": c.number("num_key_value_heads", kv_heads or n_head),
        "d_model": d_model,
        "head_dim": c.number("head_dim", head_dim or max(d_model // n_head, 1)),
        "vocab_size": c.number("vocab_size"),
        "tie_embeddings": c.flag("tie_word_embeddings", tied),
        "initializer_range": c.real("initializer_range", 0.02) or 0.02,
    }


def body_config(decoder: Decoder) -> Table:
    return {
        "num_hidden_layers": decoder.n_layer,
        "num_attention_heads": decoder.n_head,
        "num_key_value_heads": decoder.n_kv_head,
        "hidden_size": decoder.d_model,
        "head_dim": decoder.head_dim,
    }


def rms(c: Config, eps: float = 1e-6) -> Table:
    return {"kind": "rmsnorm", "eps": c.real("rms_norm_eps", eps)}


def rms_config(decoder: Decoder) -> Table:
    return {"rms_norm_eps": getattr(decoder.norm, "eps", 1e-6)}


def full(*, bias: bool = False, out_bias: bool | None = None, window: int | None = None, **options: Any) -> Table:
    """An attention layer; `out_bias` is as `bias` when it is not given."""
    return {
        "kind": "full",
        "window": window,
        "bias": bias,
        "out_bias": bias if out_bias is None else out_bias,
        **options,
    }


def tiled(parts: Sequence[Table]) -> Table | list[Table]:
    """The parts of all layers as a run file would have them: the shortest list that gives them by repetition."""
    for period in range(1, len(parts) + 1):
        if all(part == parts[i % period] for i, part in enumerate(parts)):
            return list(parts[:period]) if period > 1 else parts[0]
    return list(parts)


def biased(decoder: Decoder) -> bool:
    """Whether q, k and v of the first layer have biases."""
    own = getattr(decoder.attention[0], "bias", None)
    return bool(decoder.bias if own is None else own)


def act_of(part: Component, names: dict[str, Table], default: str) -> str:
    """The first of `names` for a feed-forward part; `default` for one that is none of them."""
    options = {"kind": part.kind, **({"approximate": "tanh"} if getattr(part, "approximate", "") == "tanh" else {})}
    return next((name for name, table in names.items() if table == options), default)


def first(parts: Sequence[Any], base: type[Any]) -> Any:
    """The first part of a certain class, None without one."""
    return next((part for part in parts if isinstance(part, base)), None)
