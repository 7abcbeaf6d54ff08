"""Text as its UTF-8 bytes: 256 ids, nothing to learn, every text fits (Xue et al. 2021, "ByT5", arXiv:2105.13626)."""

from __future__ import annotations

from typing import Any, Self

from sky_core.tokenizer.base import END_OF_TEXT, PieceTokenizer, utf8, with_special

BYTES = [bytes([i]) for i in range(256)]


class ByteTokenizer(PieceTokenizer):
    """Id i is byte i; the end of text, if there is one, is 256."""

    kind = "byte"

    def __init__(self, end_of_text: bool = True) -> None:
        super().__init__(*with_special(BYTES, [END_OF_TEXT] if end_of_text else []))

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def to_huggingface(self) -> dict[str, Any]:
        from sky_core.tokenizer.huggingface_json import byte_level_bpe

        return byte_level_bpe(self.pieces, [], self.special, None)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "end_of_text": self.end_of_text is not None}

    @classmethod
    def from_dict(cls, definition: dict[str, Any]) -> Self:
        return cls(definition["end_of_text"])
