"""Hugging Face checkpoints, read and written: config.json, safetensors (sharded or not), tokenizer files.

    config.py          config.json: what is read is ticked off, what is left and not known to be harmless is refused
    architectures/     one small declaration per architecture: config.json <-> `model:`, and the names of its tensors
    fit.py             which architecture computes what a model of ours computes
    keys.py            rules between names and layouts of tensors, usable in both directions
    tensors.py         safetensors files: one tensor at a time, never a pickle
    read.py, write.py  a folder to a model and its tokenizer, and back

Everything but the reading and writing itself is free of torch, because run files are checked without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sky_core.hf.read import load
    from sky_core.hf.write import export

__all__ = ["export", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"sky_core.hf.{'write' if name == 'export' else 'read'}"), name)
    raise AttributeError(f"module 'sky_core.hf' has no attribute {name!r}")
