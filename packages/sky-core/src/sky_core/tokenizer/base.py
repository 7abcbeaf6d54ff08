"""What every tokenizer is: text to ids and back without loss, with a fingerprint that travels with data and weights."""

from __future__ import annotations

import codecs
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from sky_core.errors import DataError, UserError
from sky_core.tokenizer.files import fingerprint_of, read_tokenizer, write_tokenizer

END_OF_TEXT = "<|endoftext|>"
"""The special token between documents."""


class Tokenizer(ABC):
    """`decode(encode(text)) == text` for every string the tokenizer accepts.

    Special tokens have ids but no text: `encode` never produces them from text, `decode` leaves them out.
    A tokenizer is picklable and does not change once made.
    """

    kind: ClassVar[str]
    special: dict[str, int]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises `sky_core.errors.UserError` naming the first character that it cannot represent."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that `ids` stand for (may end inside a character). Special tokens give nothing."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Everything that defines the tokenizer, `kind` among it, as JSON; what the fingerprint is taken over."""

    def save(self, folder: Path) -> None:
        """Write the files that the component's `load` reads; `tokenizer.json`-style text, never a pickle."""
        write_tokenizer(self, folder)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> list[int]:
        """Number of UTF-8 bytes each id stands for, 0 for special tokens: nats per token become bits per byte."""
        return [len(self.decode_bytes([i])) for i in range(self.vocab_size)]

    @property
    def end_of_text(self) -> int | None:
        """Id of the token between documents, None when the tokenizer has none."""
        return self.special.get(END_OF_TEXT)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when any id or its meaning changes."""
        return fingerprint_of(self.as_dict())


class PieceTokenizer(Tokenizer):
    """A tokenizer whose every id stands for the same bytes wherever it occurs; special tokens stand for none."""

    def __init__(self, pieces: Sequence[bytes], special: dict[str, int]) -> None:
        self.pieces = list(pieces)
        self.special = special

    @classmethod
    @abstractmethod
    def from_dict(cls, definition: dict[str, Any]) -> Self:
        """The tokenizer whose `as_dict()` is `definition`."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls.from_dict(read_tokenizer(folder))

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[dict[str, Any]]]:
        return type(self).from_dict, (self.as_dict(),)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        numbers = list(map(operator.index, ids))
        outside = next((i for i in numbers if not 0 <= i < len(self.pieces)), None)
        if outside is not None:
            raise UserError(f"token id {outside} is none of this tokenizer's 0..{len(self.pieces) - 1}")
        return b"".join([self.pieces[i] for i in numbers])


class StreamDecoder:
    """Text of ids that arrive one by one: a character is given out once its last byte is there.

    The parts joined are `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, possibly none."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """U+FFFD for a character that never became complete, else nothing; the decoder starts afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def with_special(pieces: Sequence[bytes], names: Iterable[str]) -> tuple[list[bytes], dict[str, int]]:
    """`pieces` followed by the special tokens `names`, and the ids of these."""
    special = {name: len(pieces) + i for i, name in enumerate(names)}
    return [*pieces, *[b""] * len(special)], special


def utf8(text: str) -> bytes:
    """The bytes of `text`. Raises `UserError` for a lone surrogate, which Python allows and Unicode does not."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of the text is U+{ord(text[error.start]):04X}, a lone surrogate: "
            "no Unicode text; read the file as UTF-8 with errors='replace'"
        ) from None


def corpus(texts: Iterable[str]) -> Iterator[str]:
    """The documents of a corpus, one after the other. Raises `DataError` for one that is no Unicode, or for no text."""
    empty = True
    for number, text in enumerate(texts):
        try:
            empty = not utf8(text) and empty
        except UserError as error:
            raise DataError(f"document {number} of the corpus: {error}") from None
        yield text
    if empty:
        raise DataError("the corpus to train the tokenizer on holds no text; give files with at least one character")
