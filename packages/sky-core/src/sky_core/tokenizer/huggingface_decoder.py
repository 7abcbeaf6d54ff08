"""How the decoder of a Hugging Face tokenizer.json turns the names of pieces into bytes.

ByteLevel: each character of the name is a byte. Byte fallback: `<0xE2>` is that byte, and U+2581 (or what else a
Replace or Metaspace step names) is a space; one space in front of the whole text may be dropped. These read each piece
for itself, so half a character is no loss. All others (WordPiece, ...) look at neighbours and are left to the library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sky_core.tokenizer.byte_level import from_visible

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Reading(NamedTuple):
    """How the name of a piece is read as bytes; whether a space in front of a text is dropped; whether added tokens
    are their own names."""

    read: Callable[[str], bytes]
    strips_space: bool
    literal_added_tokens: bool


def reading(decoder: Mapping[str, Any] | None) -> Reading | None:
    """Of a decoder that reads pieces one by one; None for one that the library must run."""
    steps = _steps(decoder)
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return Reading(from_visible, False, True)
    if not kinds or not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    replaced: list[tuple[Any, str]] = [
        (step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"
    ]
    replaced += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    strips = [step for step in steps if step["type"] == "Strip"]
    if any(None in pair for pair in replaced) or any(
        (step["content"], step["start"], step["stop"]) != (" ", 1, 0) for step in strips
    ):
        return None
    spaced = any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)

    def read(name: str) -> bytes:
        if "ByteFallback" in kinds and (byte := BYTE_PIECE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            name = name.replace(old, new)
        return name.encode()

    return Reading(read, spaced or bool(strips), False)


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]
