"""Byte pair encoding against its definition: count all pairs anew for each merge, replay the merges one by one."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sky_core.components.tokenizer import Bpe
from sky_core.errors import DataError, UserError
from sky_core.tokenizer.bpe import BpeTokenizer, Pair, learn_merges, merge
from sky_core.tokenizer.pattern import PATTERNS, compile_pattern, split

words_of = st.dictionaries(st.text("abc ", min_size=1, max_size=12).map(str.encode), st.integers(1, 5), max_size=8)
TEXT = "it's the other theory that they then gather there; 2024, in the north.\n" * 3


def replace(symbols: list[int], pair: Pair, new: int) -> list[int]:
    """`pair` replaced from left to right."""
    done: list[int] = []
    while symbols:
        width = 2 if tuple(symbols[:2]) == pair else 1
        done.append(new if width == 2 else symbols[0])
        symbols = symbols[width:]
    return done


def merges_by_definition(counts: dict[bytes, int], n_merges: int) -> list[Pair]:
    """Algorithm 1 of Sennrich et al. 2016, with ties settled by the pair."""
    words = [(list(word), count) for word, count in counts.items()]
    merges: list[Pair] = []
    while len(merges) < n_merges:
        pairs: Counter[Pair] = Counter()
        for symbols, count in words:
            for pair in pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = [(replace(symbols, best, 256 + len(merges)), count) for symbols, count in words]
        merges.append(best)
    return merges


@settings(max_examples=300, deadline=None)
@given(counts=words_of, n_merges=st.integers(0, 30))
def test_incremental_counts_give_the_merges_of_the_definition(counts: dict[bytes, int], n_merges: int) -> None:
    assert learn_merges(counts, n_merges) == merges_by_definition(counts, n_merges)


@settings(max_examples=200, deadline=None)
@given(counts=words_of, word=st.text("abc ", max_size=40).map(str.encode))
def test_encoding_replays_the_merges_in_the_order_learned(counts: dict[bytes, int], word: bytes) -> None:
    merges = learn_merges(counts, 30)
    expected = list(word)
    for number, pair in enumerate(merges):
        expected = replace(expected, pair, 256 + number)
    assert merge(word, {pair: 256 + number for number, pair in enumerate(merges)}) == expected


def test_every_learned_piece_is_one_token_of_its_own_text() -> None:
    one = BpeTokenizer.train([TEXT], 280)
    ranks = {pair: 256 + number for number, pair in enumerate(one.merges)}
    assert [merge(piece, ranks) for piece in one.pieces[:-1]] == [[i] for i in range(one.vocab_size - 1)]
    assert len(set(one.pieces)) == len(one.pieces)


def test_the_example_of_the_file_header() -> None:
    assert learn_merges({b"low_lower": 1}, 2) == [(ord("l"), ord("o")), (256, ord("w"))]


def test_a_larger_vocabulary_needs_fewer_tokens() -> None:
    sizes = [len(BpeTokenizer.train([TEXT], size).encode(TEXT)) for size in (257, 270, 286)]
    assert sizes[0] == len(TEXT)
    assert sizes[0] > sizes[1] > sizes[2]
    assert len(TEXT) / sizes[2] > 2.5


def test_the_fingerprint_changes_with_any_merge() -> None:
    merges = BpeTokenizer.train([TEXT], 280).merges
    prints = {BpeTokenizer(merges).fingerprint, BpeTokenizer(merges[:-1]).fingerprint}
    prints |= {BpeTokenizer([*merges[:-1], (0, 1)]).fingerprint, BpeTokenizer(merges, pattern="gpt2").fingerprint}
    assert len(prints) == 4


def test_the_work_does_not_depend_on_the_length_of_a_pre_token() -> None:
    """50 kB in one pre-token against the same in 500 of them: a quadratic method would be 500 times slower.

    The factor of 20 leaves room for the logarithm of the heap and for a busy machine.
    """
    line = bytes(random.Random(0).choices(b"abcdefgh", k=50_000))
    parts = [line[start : start + 100] for start in range(0, len(line), 100)]
    assert seconds(lambda: learn_merges({line: 1}, 1000)) < 20 * seconds(lambda: learn_merges(Counter(parts), 1000))
    ranks = {pair: 256 + number for number, pair in enumerate(learn_merges({line: 1}, 1000))}
    assert seconds(lambda: merge(line, ranks)) < 20 * seconds(lambda: [merge(part, ranks) for part in parts])


@pytest.mark.parametrize("line", ["a" * 100_000, " " * 100_000, "\u00e9" * 50_000, "\n" * 100_000])
def test_a_long_run_without_a_border_comes_back(line: str) -> None:
    one = BpeTokenizer.train([line], 262)
    assert one.decode(one.encode(line)) == line


def seconds(work: Callable[[], object]) -> float:
    """CPU time of `work`."""
    started = time.process_time()
    work()
    return time.process_time() - started


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 257"):
        Bpe(vocab_size=256)
    with pytest.raises(UserError, match="vocab_size 256 is too small: the 256 bytes and special tokens alone take 257"):
        BpeTokenizer.train([TEXT], 256)
    assert BpeTokenizer.train([TEXT], 256, end_of_text=False).vocab_size == 256


def test_a_corpus_with_too_few_pairs_says_what_it_can_give() -> None:
    with pytest.raises(DataError, match="set vocab_size to 259 or less") as problem:
        Bpe(vocab_size=8192).train(["aaa"])
    assert BpeTokenizer.train(["aaa"], 259).vocab_size == 259
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("name", sorted(PATTERNS))
@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.text("a1 '\n\r\t.sS"))
def test_the_known_patterns_cut_without_loss(name: str, text: str) -> None:
    assert "".join(split(compile_pattern(name), text)) == text


def test_digits_are_cut_as_each_pattern_says() -> None:
    cut = {name: split(compile_pattern(name), "x12345") for name in PATTERNS}
    assert cut == {
        "gpt2": ["x", "12345"],
        "gpt4": ["x", "123", "45"],
        "nanochat": ["x", "12", "34", "5"],
        "llama3": ["x", "123", "45"],
        "qwen2": ["x", "1", "2", "3", "4", "5"],
        "o200k": ["x", "123", "45"],
    }


def test_a_regular_expression_of_ones_own() -> None:
    one = BpeTokenizer.train(["ab ab ab"], 257, pattern=r"\S+|\s+", end_of_text=False)
    assert one.merges == [(ord("a"), ord("b"))]
    assert one.decode(one.encode("ab \n ab")) == "ab \n ab"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gpt3", "no pattern called 'gpt3'.*did you mean 'gpt2'|did you mean 'gpt4'"),
        (r"(\w+", "is no regular expression"),
        (r"(\w+)|\W+", "captures groups"),
    ],
)
def test_a_wrong_pattern_is_explained(pattern: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Bpe(pattern=pattern)


def test_a_pattern_that_leaves_text_out_is_refused() -> None:
    with pytest.raises(UserError, match="leaves out ' ' at character 2"):
        BpeTokenizer.train(["ab cd"], 257, pattern=r"\w+")
    with pytest.raises(UserError, match="leaves out '!' at character 2"):
        BpeTokenizer.train(["ab!"], 257, pattern=r"\w+")
