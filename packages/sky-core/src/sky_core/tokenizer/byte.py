"""Text as its UTF-8 bytes: 256 ids, nothing to learn, every text fits (Xue et al. 2021, "ByT5", arXiv:2105.13626)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from sky_core.tokenizer.base import PieceTokenizer, utf8, with_special

BYTES = [bytes([i]) for i in range(256)]


class ByteTokenizer(PieceTokenizer):
    """Id i is byte i; the special tokens come from 256 on, the end of text (if any) first."""

    kind = "byte"

    def __init__(self, end_of_text: bool = True, special: Sequence[str] = ()) -> None:
        super().__init__(*with_special(BYTES, end_of_text, special))

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def to_huggingface(self) -> dict[str, Any]:
        from sky_core.tokenizer.huggingface_json import byte_level_bpe

        return byte_level_bpe(self.pieces, [], self.special, None)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **self._special_as_dict()}

    @classmethod
    def from_dict(cls, definition: dict[str, Any]) -> Self:
        return cls(definition["end_of_text"], definition.get("special", ()))
