"""The `model:` table of a run file for a Hugging Face checkpoint, from its config.json alone. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sky_core.hf.architectures import Architecture, architecture_of
from sky_core.hf.config import Config

SCHEME = "hf:"


def folder_of(source: str) -> Path | None:
    """The folder that `hf:DIR` names, None for a source of another kind."""
    return Path(source.removeprefix(SCHEME)).expanduser() if source.startswith(SCHEME) else None


def model_table(folder: Path) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a checkpoint folder and its `model:`. Raises `UserError` for what we cannot compute."""
    c = Config.read(folder)
    architecture = architecture_of(c)
    table = architecture.to_model(c)
    c.done(architecture.harmless)
    return architecture, {"kind": "decoder", **table}
