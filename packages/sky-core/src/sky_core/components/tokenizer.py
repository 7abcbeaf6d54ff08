"""Tokenizers: characters, bytes, byte pair encoding, SentencePiece, files of other programs, and one saved before."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from sky_core.tokenizer.options import EndOfText, Pattern, Special, WithChatTemplate

if TYPE_CHECKING:
    from sky_core.tokenizer.base import Tokenizer as BuiltTokenizer


class Char(WithChatTemplate):
    """One id per character of the corpus, in the order of their code points."""

    kind: ClassVar = "char"

    byte_fallback: Annotated[
        bool,
        Field(description="write characters that the corpus lacks as bytes (256 more ids), or refuse them"),
    ] = True
    end_of_text: EndOfText = True
    special: Special = []

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        from sky_core.tokenizer.char import CharTokenizer

        options = self.model_dump(exclude={"chat_template"})
        return self.with_template(lambda: CharTokenizer.train(texts, **options))

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.char import CharTokenizer

        return CharTokenizer.load(folder)


class Byte(WithChatTemplate):
    """The 256 bytes of UTF-8: nothing to learn, every text fits."""

    kind: ClassVar = "byte"
    paper: ClassVar = "arXiv:2105.13626"

    end_of_text: EndOfText = True
    special: Special = []

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        from sky_core.tokenizer.byte import ByteTokenizer

        return self.with_template(lambda: ByteTokenizer(end_of_text=self.end_of_text, special=self.special))

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.byte import ByteTokenizer

        return ByteTokenizer.load(folder)


class Bpe(WithChatTemplate):
    """Byte pair encoding over UTF-8 bytes, learned from scratch: merge the most frequent pair, again and again."""

    kind: ClassVar = "bpe"
    paper: ClassVar = "arXiv:1508.07909"

    vocab_size: Annotated[
        int, Field(ge=257, description="number of ids: 256 bytes, the merges, and the special token if any")
    ] = 8192
    pattern: Pattern = "gpt4"
    end_of_text: EndOfText = True
    special: Special = []

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        from sky_core.tokenizer.bpe import BpeTokenizer

        options = self.model_dump(exclude={"chat_template"})
        return self.with_template(lambda: BpeTokenizer.train(texts, **options))

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.bpe import BpeTokenizer

        return BpeTokenizer.load(folder)


class SentencePiece(WithChatTemplate):
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
        int, Field(ge=259, description="number of pieces, with 256 bytes, the unknown piece and the special tokens")
    ] = 8192
    special: Special = []

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        from sky_core.tokenizer.sentencepiece import SentencePieceTokenizer

        if self.model is not None:
            path = Path(self.model)
            return self.with_template(lambda: SentencePieceTokenizer.from_model_file(path))
        options = self.model_dump(exclude={"chat_template", "model"})
        return self.with_template(lambda: SentencePieceTokenizer.train(texts, **options))

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer.load(folder)


class Tiktoken(WithChatTemplate):
    """The pieces and ranks of a tiktoken file (GPT-4, GPT-4o, Llama 3), run from scratch."""

    kind: ClassVar = "tiktoken"

    path: Annotated[str, Field(min_length=1, description="the file of ranks: *.tiktoken, or Llama 3's tokenizer.model")]
    pattern: Pattern = "gpt4"
    special: Annotated[
        list[str] | dict[str, int],
        Field(description="special tokens: names, numbered behind the last rank, or names with their ids"),
    ] = ["<|endoftext|>"]
    end_of_text: Annotated[
        str | None, Field(description="which special token stands between documents; null: none")
    ] = "<|endoftext|>"

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        from sky_core.tokenizer.tiktoken import TiktokenTokenizer

        options = {"pattern": self.pattern, "special": self.special, "end_of_text": self.end_of_text}
        return self.with_template(lambda: TiktokenTokenizer.from_file(Path(self.path), **options))

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.tiktoken import TiktokenTokenizer

        return TiktokenTokenizer.load(folder)


class HuggingFace(WithChatTemplate):
    """A Hugging Face tokenizer.json of any sort, run by the package `tokenizers` and saved as it is."""

    kind: ClassVar = "huggingface"

    path: Annotated[
        str, Field(min_length=1, description="a tokenizer.json, or a folder with one and its tokenizer_config.json")
    ]

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        from sky_core.tokenizer.huggingface import read_huggingface

        return self.with_template(lambda: read_huggingface(self.path))

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer.load(folder)


class Saved(WithChatTemplate):
    """A tokenizer that was trained before, of whatever kind: the folder that `sky tokenizer train` wrote."""

    kind: ClassVar = "saved"
    implementation: ClassVar = "sky_core.tokenizer.files:load_tokenizer"

    path: Annotated[str, Field(min_length=1, description="folder with the tokenizer.json")]

    def train(self, texts: Iterable[str]) -> BuiltTokenizer:
        return self.with_template(lambda: self.load(Path(self.path)))

    @classmethod
    def load(cls, folder: Path) -> BuiltTokenizer:
        from sky_core.tokenizer.files import load_tokenizer

        return load_tokenizer(folder)
