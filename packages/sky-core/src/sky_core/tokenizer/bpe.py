"""Byte pair encoding, from scratch: learn a vocabulary of frequent byte strings, and write text with it.

Sources: Gage 1994, "A New Algorithm for Data Compression" (the idea); Sennrich, Haddow and Birch 2016,
arXiv:1508.07909, algorithm 1 (on words, for translation); Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners", section 2.2 (on bytes, so that no text is ever out of vocabulary).

Learning. Cut the text into pre-tokens (`pattern.py`) and write each as its bytes, which are the symbols 0..255. With
n(w) the number of times the pre-token w occurs, count each pair of neighbouring symbols over the whole corpus,

    count(a, b) = sum over w of n(w) * #{i : w_i = a, w_(i+1) = b}

take the pair with the largest count (among equals, the smallest), give it the next free id, replace it everywhere,
from left to right, and repeat:

    l o w _ l o w e r     (l, o) -> 256      256 w _ 256 w e r     (256, w) -> 257      257 _ 257 e r

Encoding replays this: in each pre-token, of all pairs that were ever merged, merge the one that was learned first.

Cost. Sennrich's reference counts all pairs anew for each merge. Here all distinct pre-tokens lie one after the other in
one doubly linked list, and each pair knows the places where it occurs. A merge visits just these places, and each
visit removes one symbol for good: over all merges together at most as many visits as there are bytes in the distinct
pre-tokens, and at most two new places per visit. So the work does not depend on how long a single pre-token is, and
a line of a megabyte without a space costs what a megabyte costs. Encoding keeps the pairs of a pre-token in a heap:
n log n for n bytes, at any length. Memory while learning: some 220 bytes per byte of *distinct* pre-tokens; documents
are read one at a time.

Where we differ from GPT-2: byte i has the id i (GPT-2 permutes them), and equal counts are settled by the pair, so
that the merges are a function of the counts alone (as in karpathy/rustbpe, which gives the same merges in the same
order).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from typing import Any, Protocol, Self

from sky_core.errors import DataError, UserError
from sky_core.tokenizer.base import PieceTokenizer, corpus, utf8, with_special
from sky_core.tokenizer.byte import BYTES
from sky_core.tokenizer.pattern import compile_pattern, split

Pair = tuple[int, int]
BORDER = -1
GONE = -2


def learn_merges(counts: Mapping[bytes, int], n_merges: int) -> list[Pair]:
    """The first `n_merges` merges for pre-tokens that occur `counts` times; fewer when no pair is left.

    Merge number i makes the symbol 256 + i.
    """
    # The list: symbols between borders, one pre-token after the other. n_at[i] is the count of the pre-token at i.
    symbols, n_at = [BORDER], [0]
    for word, count in counts.items():
        if len(word) > 1:
            symbols += word
            symbols.append(BORDER)
            n_at += [count] * (len(word) + 1)
    before = list(range(-1, len(symbols) - 1))
    after = list(range(1, len(symbols) + 1))

    pair_counts: dict[Pair, int] = defaultdict(int)
    places: dict[Pair, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairwise(symbols)):
        if BORDER not in pair:
            pair_counts[pair] += n_at[i]
            places[pair].append(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)

    merges: list[Pair] = []
    while heap and len(merges) < n_merges:
        negated, pair = heappop(heap)
        # A pair gains places only in the merge that makes its younger symbol, and is pushed after that: what the
        # heap says is never too low, and looking again when it comes up is enough.
        if (count := pair_counts[pair]) != -negated:
            if count:
                heappush(heap, (-count, pair))
            continue
        new = 256 + len(merges)
        merges.append(pair)
        left, right = pair
        born: set[Pair] = set()
        for i in places.pop(pair):
            j = after[i]
            if symbols[i] != left or symbols[j] != right:
                continue
            h, k, n = before[i], after[j], n_at[i]
            if (previous := symbols[h]) != BORDER:
                pair_counts[previous, left] -= n
                pair_counts[previous, new] += n
                places[previous, new].append(h)
                born.add((previous, new))
            if (following := symbols[k]) != BORDER:
                pair_counts[right, following] -= n
                pair_counts[new, following] += n
                places[new, following].append(i)
                born.add((new, following))
            symbols[i], symbols[j] = new, GONE
            after[i], before[k] = k, i
        del pair_counts[pair]
        for made in born:
            if pair_counts[made]:  # in a run such as aaaa a pair can come and go within one merge
                heappush(heap, (-pair_counts[made], made))
    return merges


class Ranks(Protocol):
    """What pairs of symbols become: a dictionary, or anything that looks them up."""

    def get(self, pair: Pair, /) -> int | None: ...


def merge(data: Sequence[int], ranks: Ranks) -> list[int]:
    """The symbols of one pre-token (at first its bytes); `ranks` gives the symbol that each known pair becomes.

    Always the lowest rank first, among equals the leftmost: a heap of (rank, place) over a doubly linked list.
    """
    symbols = list(data)
    end = len(symbols)
    before = list(range(-1, end - 1))
    after = list(range(1, end + 1))
    heap = [(rank, i) for i, pair in enumerate(pairwise(symbols)) if (rank := ranks.get(pair)) is not None]
    heapify(heap)
    while heap:
        new, i = heappop(heap)
        j = after[i]
        if j == end or symbols[i] == GONE or ranks.get((symbols[i], symbols[j])) != new:
            continue
        symbols[i], symbols[j] = new, GONE
        k = after[i] = after[j]
        if k < end:
            before[k] = i
            if (rank := ranks.get((new, symbols[k]))) is not None:
                heappush(heap, (rank, i))
        h = before[i]
        if h >= 0 and (rank := ranks.get((symbols[h], new))) is not None:
            heappush(heap, (rank, h))
    return [symbol for symbol in symbols if symbol != GONE]


class Remembered(dict[str, list[int]]):
    """Pre-token -> ids, worked out by `encode` when first asked for; forgets everything when full."""

    MOST = 1 << 17
    LONGEST = 64

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self.encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self.encode(word)
        if len(word) <= self.LONGEST:
            if len(self) >= self.MOST:
                self.clear()
            self[word] = ids
        return ids


class BpeTokenizer(PieceTokenizer):
    """Ids: the 256 bytes, one for each merge in the order learned, the special tokens (the end of text first)."""

    kind = "bpe"

    def __init__(
        self,
        merges: Sequence[Pair],
        pattern: str = "gpt4",
        end_of_text: bool = True,
        special: Sequence[str] = (),
    ) -> None:
        self.merges = list(merges)
        self.pattern = pattern
        self._compiled = compile_pattern(pattern)
        ranks = {pair: 256 + i for i, pair in enumerate(self.merges)}
        self._merged = Remembered(lambda word: merge(word.encode(), ranks))
        pieces = list(BYTES)
        for left, right in self.merges:
            pieces.append(pieces[left] + pieces[right])
        super().__init__(*with_special(pieces, end_of_text, special))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = "gpt4",
        end_of_text: bool = True,
        special: Sequence[str] = (),
    ) -> Self:
        """Learn `vocab_size` ids (bytes, merges and special tokens together) from documents, read one at a time.

        Raises `UserError` when `vocab_size` leaves no room for the bytes, `DataError` when the corpus is empty or has
        too few different pairs.
        """
        n_merges = vocab_size - len(with_special(BYTES, end_of_text, special)[0])
        if n_merges < 0:
            raise UserError(
                f"vocab_size {vocab_size} is too small: the 256 bytes and special tokens alone take "
                f"{vocab_size - n_merges}"
            )
        compiled = compile_pattern(pattern)
        counts: Counter[str] = Counter()
        for text in corpus(texts):
            counts.update(split(compiled, text))
        merges = learn_merges({word.encode(): count for word, count in counts.items()}, n_merges)
        if len(merges) < n_merges:
            most = vocab_size - n_merges + len(merges)
            raise DataError(
                f"the corpus is too small for vocab_size {vocab_size}: after {len(merges)} merges no pair is left; "
                f"set vocab_size to {most} or less, or give more text"
            )
        return cls(merges, pattern, end_of_text, special)

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return list(chain.from_iterable(map(self._merged.__getitem__, split(self._compiled, text))))

    def to_huggingface(self) -> dict[str, Any]:
        from sky_core.tokenizer.huggingface_json import byte_level_bpe

        return byte_level_bpe(self.pieces, self.merges, self.special, self._compiled.pattern)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "pattern": self._compiled.pattern,
            "merges": [f"{left} {right}" for left, right in self.merges],
            **self._special_as_dict(),
        }

    @classmethod
    def from_dict(cls, definition: dict[str, Any]) -> Self:
        pairs = (line.split() for line in definition["merges"])
        return cls(
            [(int(a), int(b)) for a, b in pairs],
            definition["pattern"],
            definition["end_of_text"],
            definition.get("special", ()),
        )
