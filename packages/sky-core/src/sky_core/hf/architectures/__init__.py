"""The architectures of Hugging Face that a model of ours can be, in the order in which they are tried on export."""

from __future__ import annotations

from sky_core.component import closest
from sky_core.errors import UserError
from sky_core.hf.architectures.base import Architecture
from sky_core.hf.architectures.dense import Gemma2, Llama, Mistral, Olmo2, Qwen2, Qwen3
from sky_core.hf.architectures.gpt import GPT2, GPTNeoX
from sky_core.hf.architectures.sparse import DeepseekV3, Mixtral, Qwen3Moe
from sky_core.hf.config import Config

ARCHITECTURES: dict[str, Architecture] = {
    one.model_type: one()
    for one in (Llama, Mistral, Qwen2, Qwen3, Olmo2, Gemma2, GPT2, GPTNeoX, Mixtral, Qwen3Moe, DeepseekV3)
}


def architecture_of(c: Config) -> Architecture:
    """The architecture that a config.json names. Raises `UserError` for one that is not known here."""
    return architecture(str(c.take("model_type")), f"{c.file}: ")


def architecture(model_type: str, place: str = "") -> Architecture:
    """The architecture of that `model_type`. Raises `UserError` listing those there are."""
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"{place}no architecture called {model_type!r} (have: {', '.join(ARCHITECTURES)})"
            f"{closest(model_type, ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]
