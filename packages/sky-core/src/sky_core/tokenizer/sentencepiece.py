"""SentencePiece without loss (Kudo and Richardson 2018, arXiv:1808.06226; unigram model: Kudo 2018, arXiv:1804.10959).

By default SentencePiece folds characters (NFKC), squeezes spaces and puts one in front, which destroys code. Here
nothing is rewritten: identity normalisation, every space kept, pieces of white space allowed, no space in front, and
what the vocabulary lacks goes out as bytes. Newlines are ordinary characters; a tab is a byte.

One loss is left in the library: it writes a space as U+2581 (a low block), so that a U+2581 in the text would come back
as a space. We spell that character in bytes. What is left to trust is checked: `encode` raises where its ids would
not decode to the same text, and a model that rewrites text is refused when it is loaded.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

from sky_core.errors import DataError, UserError
from sky_core.files import write_atomic
from sky_core.tokenizer.base import END_OF_TEXT, PieceTokenizer, corpus, utf8, with_special

SPACE = "\u2581"
SLICE = 4096
PROBE = " a  B\t \n\n Å ﬁ ① e\u0301 "
"""Text that every usual normalisation changes."""


def _library() -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            "the tokenizer kind 'sentencepiece' needs the package sentencepiece: pip install 'sky-core[sentencepiece]'"
        ) from None
    return sentencepiece


class SentencePieceTokenizer(PieceTokenizer):
    """A SentencePiece model (the bytes of its .model file). Ids are the model's own."""

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self.model = model
        try:
            self._processor = _library().SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(
                "this is no SentencePiece model; a tokenizer.json and a file of tiktoken ranks go by their names"
            ) from error
        ids = range(len(self._processor))
        special = {
            self._processor.id_to_piece(i): i
            for i in ids
            if self._processor.is_control(i) or self._processor.is_unknown(i)
        }
        if END_OF_TEXT not in special and self._processor.eos_id() >= 0:
            self.end_of_text_name = self._processor.id_to_piece(self._processor.eos_id())
        super().__init__([self._bytes_of(i) for i in ids], special)
        self._lossy_spaces = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def _bytes_of(self, i: int) -> bytes:
        piece: str = self._processor.id_to_piece(i)
        if self._processor.is_control(i) or self._processor.is_unknown(i):
            return b""
        if self._processor.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, model_type: str = "unigram", special: Sequence[str] = ()
    ) -> Self:
        """Learn `vocab_size` pieces by the `unigram` or the `bpe` method, special tokens among them.

        The library holds the corpus in memory. Raises `DataError` when that is empty or has too few pieces, or too
        many characters, for `vocab_size`.
        """
        library = _library()
        written = io.BytesIO()
        try:
            library.SentencePieceTrainer.train(
                sentence_iterator=_slices(texts),
                model_writer=written,
                model_type=model_type,
                vocab_size=vocab_size,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                control_symbols=list(with_special([], True, special)[1]),
                max_sentence_length=4 * SLICE,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise DataError(_explain(str(error), vocab_size)) from None
        return cls(written.getvalue())

    @classmethod
    def from_model_file(cls, path: Path) -> Self:
        """The tokenizer of a .model file. Raises `DataError` when it cannot be read or rewrites text."""
        try:
            tokenizer = cls(path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"no SentencePiece model at {path}") from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if tokenizer._processor.normalize(PROBE) != PROBE.replace(" ", SPACE):
            raise DataError(
                f"{path} rewrites text (normalisation, squeezed spaces or a space in front), so nothing could be "
                "decoded exactly; train one with: sky tokenizer train --kind sentencepiece"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        data = utf8(text)
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            ids += self._lossy_spaces if number else []
            ids += self._processor.encode(part)
        if self.decode_bytes(ids) != data:
            place = next((i for i, (a, b) in enumerate(zip_longest(text, self.decode(ids))) if a != b), 0)
            raise UserError(
                f"this SentencePiece model loses character {place} of the text, {text[place : place + 1]!r}: it has no "
                "byte fallback or rewrites text; train one with: sky tokenizer train --kind sentencepiece"
            )
        return ids

    def to_huggingface(self) -> dict[str, Any]:
        from sky_core.tokenizer.huggingface_sentencepiece import pipeline_of

        return pipeline_of(self.model, self.pieces, self.special)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": base64.b64encode(self.model).decode()}

    @classmethod
    def from_dict(cls, definition: dict[str, Any]) -> Self:
        return cls(base64.b64decode(definition["model"]))

    def save(self, folder: Path) -> None:
        """As every tokenizer, and the model once more as `tokenizer.model`, for other programs."""
        super().save(folder)
        write_atomic(folder / "tokenizer.model", self.model)


def _slices(texts: Iterable[str]) -> Iterator[str]:
    """The corpus in parts of at most SLICE characters: longer "sentences" would be dropped without a word."""
    for text in corpus(texts):
        for start in range(0, len(text), SLICE):
            yield text[start : start + SLICE]


def _explain(message: str, vocab_size: int) -> str:
    if found := re.search(r"value <= (\d+)", message):
        return (
            f"the corpus is too small for vocab_size {vocab_size}: it gives at most {found[1]} pieces; "
            f"set vocab_size to {found[1]} or less, or give more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small: bytes, special tokens and the characters of this corpus take "
            f"{found[1]}; set it to more than that"
        )
    return f"SentencePiece could not be trained: {message}"
