"""Tokenizers: characters, bytes, byte pair encoding, SentencePiece, and one that was saved before."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from sky_core.errors import UserError
from sky_core.slots import Tokenizer

if TYPE_CHECKING:
    from sky_core.tokenizer.base import Tokenizer as BuiltTokenizer

EndOfText = Annotated[bool, Field(description="add the special token <|endoftext|>, which stands between documents")]


class Char(Tokenizer):
    """One id per character of the corpus, in the order of their code points."""

    kind: ClassVar = "char"

    byte_fallback: Annotated[
        bool,
        Field(description="write characters that the corpus lacks as bytes (256 more ids), or refuse them"),
    ] = True
    end_of_text: EndOfText = True

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        from sky_core.tokenizer.char import CharTokenizer

        return CharTokenizer.train(texts, byte_fallback=self.byte_fallback, end_of_text=self.end_of_text)

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.char import CharTokenizer

        return CharTokenizer.load(folder)


class Byte(Tokenizer):
    """The 256 bytes of UTF-8: nothing to learn, every text fits."""

    kind: ClassVar = "byte"
    paper: ClassVar = "arXiv:2105.13626"

    end_of_text: EndOfText = True

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        from sky_core.tokenizer.byte import ByteTokenizer

        return ByteTokenizer(end_of_text=self.end_of_text)

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.byte import ByteTokenizer

        return ByteTokenizer.load(folder)


class Bpe(Tokenizer):
    """Byte pair encoding over UTF-8 bytes, learned from scratch: merge the most frequent pair, again and again."""

    kind: ClassVar = "bpe"
    paper: ClassVar = "arXiv:1508.07909"

    vocab_size: Annotated[
        int, Field(ge=257, description="number of ids: 256 bytes, the merges, and the special token if any")
    ] = 8192
    pattern: Annotated[
        str,
        Field(description="how text is cut before pairs are counted: gpt2, gpt4, nanochat, or a regular expression"),
    ] = "gpt4"
    end_of_text: EndOfText = True

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str) -> str:
        from sky_core.tokenizer.pattern import compile_pattern

        try:
            compile_pattern(pattern)
        except UserError as error:
            raise ValueError(str(error)) from error
        return pattern

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        from sky_core.tokenizer.bpe import BpeTokenizer

        return BpeTokenizer.train(texts, self.vocab_size, pattern=self.pattern, end_of_text=self.end_of_text)

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.bpe import BpeTokenizer

        return BpeTokenizer.load(folder)


class SentencePiece(Tokenizer):
    """Google's SentencePiece (unigram or BPE), set so that no character of any text is lost."""

    kind: ClassVar = "sentencepiece"
    paper: ClassVar = "arXiv:1808.06226"

    model: Annotated[
        str | None,
        Field(description="a trained .model file to read; nothing is learned and the options below do not matter"),
    ] = None
    model_type: Annotated[
        Literal["unigram", "bpe"], Field(description="language model over pieces (Kudo 2018), or merges")
    ] = "unigram"
    vocab_size: Annotated[
        int, Field(ge=259, description="number of pieces, with 256 bytes, the unknown piece and <|endoftext|>")
    ] = 8192

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        from sky_core.tokenizer.sentencepiece import SentencePieceTokenizer

        if self.model is not None:
            return SentencePieceTokenizer.from_model_file(Path(self.model))
        return SentencePieceTokenizer.train(texts, self.vocab_size, model_type=self.model_type)

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer.load(folder)


class HuggingFace(Tokenizer):
    """A Hugging Face tokenizer.json of any sort, run by the package `tokenizers` and saved as it is."""

    kind: ClassVar = "huggingface"

    path: Annotated[
        str, Field(min_length=1, description="a tokenizer.json, or a folder with one and its tokenizer_config.json")
    ]

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        from sky_core.tokenizer.huggingface import read_huggingface

        return read_huggingface(self.path)

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer.load(folder)


class Saved(Tokenizer):
    """A tokenizer that was trained before, of whatever kind: the folder that `sky tokenizer train` wrote."""

    kind: ClassVar = "saved"
    implementation: ClassVar = "sky_core.tokenizer.files:load_tokenizer"

    path: Annotated[str, Field(min_length=1, description="folder with the tokenizer.json")]

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        return self.load(Path(self.path))

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.files import load_tokenizer

        return load_tokenizer(folder)
