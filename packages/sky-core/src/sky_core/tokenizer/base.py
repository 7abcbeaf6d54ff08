"""What every tokenizer is: text to ids and back, without loss, with a fingerprint that travels with data and weights."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

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
        """Everything that defines the tokenizer, as JSON; what the fingerprint is taken over."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the files that the component's `load` reads; `tokenizer.json`-style text, never a pickle."""

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

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when any id or its meaning changes."""
        text = json.dumps(self.as_dict(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
