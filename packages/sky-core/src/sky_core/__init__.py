"""skyGPT's trunk: plugin machinery, run files, decoder, tokenizers, data, trainer, sampling and the `sky` command.

    model, tokenizer = sky_core.load("runs/x")
    logits_BTV = model(tokens_BT)
    text = sky_core.generate(model, tokenizer, "Once", max_new_tokens=50)
    run = sky_core.train("run.yaml", overrides=["model.n_layer=6"])

Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from sky_core.api import generate, load, resume, train

API_VERSION = 2
"""Version of the hooks and slot contracts; a plugin module states the one it was written for as `sky_api`."""

__version__ = _version("sky-core")
hookspec = pluggy.HookspecMarker("sky")
hookimpl = pluggy.HookimplMarker("sky")

__all__ = ["API_VERSION", "generate", "hookimpl", "hookspec", "load", "resume", "train"]


def __getattr__(name: str) -> Any:
    if name in ("load", "generate", "train", "resume"):
        return getattr(importlib.import_module("sky_core.api"), name)
    raise AttributeError(f"module 'sky_core' has no attribute {name!r}")
