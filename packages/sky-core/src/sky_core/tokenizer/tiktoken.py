"""tiktoken's rank files (OpenAI's `*.tiktoken`, Llama 3's tokenizer.model): one line `base64-of-the-piece rank` each.

Byte pair encoding that is given as pieces instead of merges. A piece's rank is its id. A pre-token that is a piece is
that piece; of any other, the two neighbours whose concatenation has the lowest rank are merged, the leftmost first,
until no concatenation is a piece (tiktoken `src/lib.rs`, `byte_pair_merge`).

Relative to `bpe.py` nothing changes but the look-up: there a pair becomes what it was merged into, here what it spells.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

from sky_core.errors import DataError, UserError
from sky_core.tokenizer.base import END_OF_TEXT, MOST_IDS, PieceTokenizer, utf8
from sky_core.tokenizer.bpe import Pair, Remembered, merge
from sky_core.tokenizer.byte import BYTES
from sky_core.tokenizer.pattern import compile_pattern, split


def read_ranks(path: Path) -> dict[bytes, int]:
    """Piece -> rank of a rank file. Raises `DataError` naming the first line that is none."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise DataError(f"no rank file at {path}") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        piece, _, rank = line.partition(b" ")
        try:
            key = base64.b64decode(piece, validate=True)
            if not key or key in ranks:
                raise ValueError("there twice" if key else "empty")
            ranks[key] = int(rank)
        except (ValueError, binascii.Error):
            shown = line[:40].decode("utf-8", errors="replace")
            raise DataError(f"{path}: line {number} is no new base64 piece and its rank: {shown!r}") from None
    if len(set(ranks.values())) < len(ranks) or not all(0 <= rank < MOST_IDS for rank in ranks.values()):
        raise DataError(f"{path}: ranks must be different, from 0 to {MOST_IDS - 1:,}; the file is damaged")
    if missing := [byte for byte in BYTES if byte not in ranks]:
        raise DataError(f"{path}: {len(missing)} of the 256 bytes have no rank, so some text could not be written")
    return ranks


class _Spelled:
    """What a pair of pieces becomes: the piece that it spells."""

    def __init__(self, pieces: Sequence[bytes], ranks: Mapping[bytes, int]) -> None:
        self.pieces, self.ranks = pieces, ranks

    def get(self, pair: Pair, /) -> int | None:
        return self.ranks.get(self.pieces[pair[0]] + self.pieces[pair[1]])


class TiktokenTokenizer(PieceTokenizer):
    """Ids are ranks; `special` gives further ids by name, or names that are numbered behind the last rank.

    Raises `UserError` when a special token takes the id of a piece, or `end_of_text` is none of them.
    """

    kind = "tiktoken"

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        pattern: str = "gpt4",
        special: Mapping[str, int] | Sequence[str] = (END_OF_TEXT,),
        end_of_text: str | None = END_OF_TEXT,
    ) -> None:
        self.ranks = dict(ranks)
        self.pattern = pattern
        self._compiled = compile_pattern(pattern)
        first = max(self.ranks.values()) + 1
        if not isinstance(special, Mapping):
            special = {name: first + i for i, name in enumerate(special)}
        taken = set(self.ranks.values())
        for name, i in special.items():
            if i in taken or not 0 <= i < MOST_IDS or not name:
                raise UserError(f"special: {name!r} cannot have the id {i}; ids from {first} on are free")
            taken.add(i)
        if end_of_text is not None and end_of_text not in special:
            raise UserError(
                f"end_of_text: {end_of_text!r} is none of the special tokens ({', '.join(special) or 'none'})"
            )
        self.end_of_text_name = end_of_text
        pieces = [b""] * (max(taken) + 1)
        for piece, rank in self.ranks.items():
            pieces[rank] = piece
        super().__init__(pieces, dict(special))
        self._bytes = [self.ranks[byte] for byte in BYTES]
        spelled = _Spelled(self.pieces, self.ranks)
        self._merged = Remembered(lambda word: self._merge(word.encode(), spelled))

    def _merge(self, data: bytes, spelled: _Spelled) -> list[int]:
        if (rank := self.ranks.get(data)) is not None:
            return [rank]
        return merge([self._bytes[byte] for byte in data], spelled)

    @classmethod
    def from_file(cls, path: Path, **options: Any) -> Self:
        """The tokenizer of a rank file; options as those of the class. Raises `DataError` for a file that is none."""
        return cls(read_ranks(path), **options)

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return list(chain.from_iterable(map(self._merged.__getitem__, split(self._compiled, text))))

    def to_huggingface(self) -> dict[str, Any]:
        """The merges are every way to put a piece together from two, in the order of the pieces.

        As in transformers' converter. Among several ways to spell one piece tiktoken takes the leftmost, a list of
        merges the first of the list; only overlapping ways to spell the same piece could tell these apart, and
        ranks that byte pair encoding learned have none.
        """
        from sky_core.tokenizer.huggingface_json import byte_level_bpe

        return byte_level_bpe(self.pieces, self._pairs(), self.special, self._compiled.pattern, ignore_merges=True)

    def _pairs(self) -> Iterator[Pair]:
        get = self.ranks.get
        for piece in filter(None, self.pieces):
            halves = ((get(piece[:cut]), get(piece[cut:])) for cut in range(1, len(piece)))
            yield from sorted((left, right) for left, right in halves if left is not None and right is not None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "pattern": self._compiled.pattern,
            "special": self.special,
            "end_of_text": self.end_of_text_name,
            "ranks": {base64.b64encode(piece).decode(): rank for piece, rank in self.ranks.items()},
        }

    @classmethod
    def from_dict(cls, definition: dict[str, Any]) -> Self:
        ranks = {base64.b64decode(piece): rank for piece, rank in definition["ranks"].items()}
        return cls(ranks, definition["pattern"], definition["special"], definition["end_of_text"])
