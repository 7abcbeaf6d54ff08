"""The contract of a tokenizer, held by those that are files of other programs."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from sky_core.components import tokenizer
from sky_core.testing import TokenizerContract
from sky_core.testing.tokenizer import CORPUS


class TestByteWithFurtherSpecials(TokenizerContract):
    component = tokenizer.Byte(special=["<|user|>", "<|assistant|>"])


class TestTiktoken(TokenizerContract):
    component = tokenizer.Tiktoken(path="elsewhere")

    @pytest.fixture(autouse=True)
    def _ranks(self, tmp_path: Path) -> None:
        pieces = [piece for piece in tokenizer.Bpe(vocab_size=400).train(CORPUS).pieces if piece]
        lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces)]
        (tmp_path / "ranks.tiktoken").write_text("".join(lines))
        type(self).component = tokenizer.Tiktoken(path=str(tmp_path / "ranks.tiktoken"))


class TestHuggingFace(TokenizerContract):
    component = tokenizer.HuggingFace(path="elsewhere")

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers", reason="tokenizers is an extra: sky-core[hf]")
        from sky_core.tokenizer.huggingface import write_huggingface

        write_huggingface(tokenizer.Bpe(vocab_size=400).train(CORPUS), tmp_path / "hf")
        type(self).component = tokenizer.HuggingFace(path=str(tmp_path / "hf"))
