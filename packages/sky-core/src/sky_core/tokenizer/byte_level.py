"""Bytes as visible characters, so that a JSON file can hold any piece (Radford et al. 2019, GPT-2's `encoder.py`).

The bytes that Latin-1 prints are themselves; the 68 others, in order, are the characters from U+0100 on. A space is Ġ,
a newline Ċ. The Hugging Face ByteLevel pre-tokenizer and decoder use the same alphabet.
"""

from __future__ import annotations

PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTED]
VISIBLE = {byte: chr(byte) for byte in PRINTED} | {byte: chr(0x100 + i) for i, byte in enumerate(HIDDEN)}
BYTE = {character: byte for byte, character in VISIBLE.items()}


def to_visible(piece: bytes) -> str:
    """One character for each byte."""
    return piece.decode("latin-1").translate(VISIBLE)


def from_visible(piece: str) -> bytes:
    """The bytes that `to_visible` made `piece` of; a piece with any other character stands for its own UTF-8 bytes."""
    try:
        return bytes([BYTE[character] for character in piece])
    except KeyError:
        return piece.encode()
