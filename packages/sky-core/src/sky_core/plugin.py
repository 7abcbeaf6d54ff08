"""What core itself offers, through the same hooks as any plugin. Torch-free."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from sky_core import API_VERSION, hookimpl, slots
from sky_core.component import Component
from sky_core.components import (
    attention,
    data,
    evaluation,
    generation,
    layers,
    model,
    moe,
    optimization,
    position,
    tokenizer,
    training,
)

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer

sky_api = API_VERSION


def _in(module: ModuleType, base: type[Component]) -> list[type[Component]]:
    """The components of one slot that `module` defines, in the order of its source."""
    return [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, base) and item.__module__ == module.__name__
    ]


@hookimpl
def sky_models() -> list[type[Component]]:
    return _in(model, slots.Model)


@hookimpl
def sky_blocks() -> list[type[Component]]:
    return _in(layers, slots.Block)


@hookimpl
def sky_attention() -> list[type[Component]]:
    return _in(attention, slots.Attention)


@hookimpl
def sky_kernels() -> list[type[Component]]:
    return _in(attention, slots.Kernel)


@hookimpl
def sky_feedforwards() -> list[type[Component]]:
    return _in(layers, slots.FeedForward) + _in(moe, slots.FeedForward)


@hookimpl
def sky_positions() -> list[type[Component]]:
    return _in(position, slots.Position)


@hookimpl
def sky_norms() -> list[type[Component]]:
    return _in(layers, slots.Norm)


@hookimpl
def sky_tokenizers() -> list[type[Component]]:
    return _in(tokenizer, slots.Tokenizer)


@hookimpl
def sky_datasets() -> list[type[Component]]:
    return _in(data, slots.Dataset)


@hookimpl
def sky_objectives() -> list[type[Component]]:
    return _in(training, slots.Objective)


@hookimpl
def sky_optimizers() -> list[type[Component]]:
    return _in(optimization, slots.Optimizer)


@hookimpl
def sky_schedules() -> list[type[Component]]:
    return _in(optimization, slots.Schedule)


@hookimpl
def sky_engines() -> list[type[Component]]:
    return _in(training, slots.Engine)


@hookimpl
def sky_trainers() -> list[type[Component]]:
    return _in(training, slots.Trainer)


@hookimpl
def sky_callbacks() -> list[type[Component]]:
    return _in(training, slots.Callback)


@hookimpl
def sky_evals() -> list[type[Component]]:
    return _in(evaluation, slots.Eval)


@hookimpl
def sky_samplers() -> list[type[Component]]:
    return _in(generation, slots.Sampler)


@hookimpl
def sky_load_model(source: str) -> tuple[LanguageModel, Tokenizer] | None:
    """`hf:DIR`: a Hugging Face checkpoint, straight from its files."""
    from sky_core.hf.table import folder_of

    folder = folder_of(source)
    if folder is None:
        return None
    from sky_core.hf.read import load

    return load(folder)
