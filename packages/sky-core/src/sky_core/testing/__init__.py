"""Contract tests for plugin authors: one class per slot; subclass it, name your component, get the whole suite.

    from sky_core.testing import AttentionContract

    class TestSliding(AttentionContract):
        component = SlidingWindow(window=4)
        visible = staticmethod(lambda t, s: 0 <= t - s < 4)

What a part can and can't do is said with class attributes; what it says it can't do it must refuse in one clear line.
A standard test can't be removed silently: overriding one needs `pytest.mark.xfail(reason=...)` or `skip(reason=...)`.

Nothing is imported before it is asked for, so loading the pytest plugin costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sky_core.testing.adapter import AdapterContract as AdapterContract
    from sky_core.testing.attention import AttentionContract as AttentionContract
    from sky_core.testing.component import ComponentContract as ComponentContract
    from sky_core.testing.component import SectionContract as SectionContract
    from sky_core.testing.dataset import DatasetContract as DatasetContract
    from sky_core.testing.engine import CallbackContract as CallbackContract
    from sky_core.testing.engine import EngineContract as EngineContract
    from sky_core.testing.engine import TrainerContract as TrainerContract
    from sky_core.testing.generation import EvalContract as EvalContract
    from sky_core.testing.generation import SamplerContract as SamplerContract
    from sky_core.testing.kernel import KernelContract as KernelContract
    from sky_core.testing.layers import BlockContract as BlockContract
    from sky_core.testing.layers import FeedForwardContract as FeedForwardContract
    from sky_core.testing.layers import NormContract as NormContract
    from sky_core.testing.layers import PositionContract as PositionContract
    from sky_core.testing.memory import MemoryContract as MemoryContract
    from sky_core.testing.model import ModelContract as ModelContract
    from sky_core.testing.objective import ObjectiveContract as ObjectiveContract
    from sky_core.testing.optimization import OptimizerContract as OptimizerContract
    from sky_core.testing.optimization import ScheduleContract as ScheduleContract
    from sky_core.testing.tokenizer import TokenizerContract as TokenizerContract

_HOME = {
    "ComponentContract": "component",
    "SectionContract": "component",
    "AttentionContract": "attention",
    "BlockContract": "layers",
    "FeedForwardContract": "layers",
    "KernelContract": "kernel",
    "NormContract": "layers",
    "PositionContract": "layers",
    "ModelContract": "model",
    "MemoryContract": "memory",
    "AdapterContract": "adapter",
    "TokenizerContract": "tokenizer",
    "DatasetContract": "dataset",
    "ObjectiveContract": "objective",
    "OptimizerContract": "optimization",
    "ScheduleContract": "optimization",
    "EngineContract": "engine",
    "TrainerContract": "engine",
    "CallbackContract": "engine",
    "EvalContract": "generation",
    "SamplerContract": "generation",
}
"""Contract class -> the module of this package that holds it."""

__all__ = sorted(_HOME)  # noqa: PLE0605 (names resolved by __getattr__)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
