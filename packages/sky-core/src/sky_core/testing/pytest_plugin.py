"""pytest fixtures for plugin authors (entry point `pytest11`): a hermetic sandbox and tiny models, tokenizers and data.

Loading this module imports no torch: each fixture imports what it needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sky_core.data.dataset import Dataset
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer

pytest.register_assert_rewrite("sky_core.testing")


@pytest.fixture
def sky_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder and core's parts alone: no installed plugin, no state of an earlier test.

    Load further plugins with `sky_core.plugins.load_plugins(["./mine.py"])`; what was loaded before comes back after.
    """
    from sky_core import component, plugins

    folder = tmp_path / "sandbox"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SKY_PLUGINS", "")
    monkeypatch.setattr(plugins, "_loaded", None)
    monkeypatch.setattr(component, "_active", None)
    plugins.load_plugins()
    return folder


@pytest.fixture
def tiny_tokenizer() -> Tokenizer:
    """A byte tokenizer: every text, 256 ids and the end of text."""
    from sky_core.testing.workbench import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def tiny_model(tiny_tokenizer: Tokenizer) -> LanguageModel:
    """A decoder of two layers over the vocabulary of `tiny_tokenizer`, seeded, in evaluation mode."""
    from sky_core.testing.workbench import tiny_model

    return tiny_model(tiny_tokenizer.vocab_size)


@pytest.fixture
def tiny_dataset(tiny_tokenizer: Tokenizer) -> Dataset:
    """Sixteen training sequences of 16 tokens and a small validation split, in memory."""
    from sky_core.testing.workbench import TinyDataset

    return TinyDataset(tiny_tokenizer)
