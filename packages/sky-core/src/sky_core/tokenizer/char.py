"""One id per character, as in nanoGPT's `data/shakespeare_char/prepare.py`.

Ids follow the code points of the characters seen in training. Where we differ: with `byte_fallback` 256 further ids
stand for bytes, and a character that was never seen is written as its UTF-8 bytes instead of being an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

from sky_core.errors import UserError
from sky_core.tokenizer.base import PieceTokenizer, corpus, utf8, with_special
from sky_core.tokenizer.byte import BYTES


class CharTokenizer(PieceTokenizer):
    """Ids: the characters in order, 256 bytes (with `byte_fallback`), the special tokens (the end of text first)."""

    kind = "char"

    def __init__(
        self, characters: str, byte_fallback: bool = True, end_of_text: bool = True, special: Sequence[str] = ()
    ) -> None:
        self.characters = characters
        self.byte_fallback = byte_fallback
        self._ids = {character: i for i, character in enumerate(characters)}
        pieces = [*map(utf8, characters), *(BYTES if byte_fallback else [])]
        super().__init__(*with_special(pieces, end_of_text, special))

    @classmethod
    def train(
        cls, texts: Iterable[str], byte_fallback: bool = True, end_of_text: bool = True, special: Sequence[str] = ()
    ) -> Self:
        """The tokenizer of all characters in `texts`. Raises `DataError` when there are none."""
        seen: set[str] = set()
        for text in corpus(texts):
            seen.update(text)
        return cls("".join(sorted(seen)), byte_fallback, end_of_text, special)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            utf8(text)
            return [i for position, character in enumerate(text) for i in self._spell(character, position)]

    def _spell(self, character: str, position: int) -> list[int]:
        if character in self._ids:
            return [self._ids[character]]
        if not self.byte_fallback:
            raise UserError(
                f"character {position} of the text, {character!r} (U+{ord(character):04X}), is none of the "
                f"{len(self.characters)} characters that this tokenizer knows; train it with byte_fallback: true"
            )
        return [len(self.characters) + byte for byte in character.encode()]

    def to_huggingface(self) -> dict[str, Any]:
        from sky_core.tokenizer.huggingface_json import characters

        return characters(self.characters, self.special, byte_fallback=self.byte_fallback)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "characters": self.characters,
            "byte_fallback": self.byte_fallback,
            **self._special_as_dict(),
        }

    @classmethod
    def from_dict(cls, definition: dict[str, Any]) -> Self:
        return cls(
            definition["characters"],
            definition["byte_fallback"],
            definition["end_of_text"],
            definition.get("special", ()),
        )
