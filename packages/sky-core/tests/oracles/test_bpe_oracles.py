"""Byte pair encoding against the reference trainers (rustbpe, Hugging Face tokenizers) and the encoder of tiktoken.

The corpus is the sources of the standard library of the Python that runs this: a megabyte of code and English.
"""

from __future__ import annotations

import random
import sysconfig
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sky_core.tokenizer.bpe import BpeTokenizer
from sky_core.tokenizer.pattern import PATTERNS

VOCAB_SIZE = 1536
NON_LATIN = (
    "Größe naïve Привет, мир! 日本語、中文 ١٢٣ 😀\U0001f469\u200d\U0001f467 \r\n\u00a0\u3000\u2028 "
    "I'LL don't \uff21\uff22\uff11 \x00\x1c\x85\n"
)


@cache
def documents() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [*(path.read_text(encoding="utf-8") for path in files[:40]), NON_LATIN * 20]


@cache
def ours(name: str) -> BpeTokenizer:
    return BpeTokenizer.train(documents(), VOCAB_SIZE, pattern=name, end_of_text=False)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_merge_for_merge_the_same_as_rustbpe(name: str) -> None:
    rustbpe = pytest.importorskip("rustbpe", reason="rustbpe is the reference trainer")
    reference = rustbpe.Tokenizer()
    reference.train_from_iterator(iter(documents()), VOCAB_SIZE, pattern=PATTERNS[name])
    ranked = sorted(reference.get_mergeable_ranks(), key=lambda item: item[1])
    assert [bytes(piece) for piece, _ in ranked] == ours(name).pieces
    assert all(reference.encode(text) == ours(name).encode(text) for text in documents())


def test_the_same_pieces_as_hugging_face_tokenizers() -> None:
    """As a set: that library settles equal counts by its own numbering of bytes, so the order of merges may differ.

    The corpus is drawn, and the same everywhere, so that no tie at the last merge makes the sets differ.
    """
    library = pytest.importorskip("tokenizers", reason="Hugging Face tokenizers is a reference trainer")
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdluäß", k=draw.randint(2, 9))) for _ in range(2000)]
    text = " ".join(draw.choices(words, weights=[1 / rank for rank in range(1, 2001)], k=50_000))
    reference = library.Tokenizer(library.models.BPE())
    reference.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(iter([text]), trainer)
    one = BpeTokenizer.train([text], 1024, pattern="gpt2", end_of_text=False)
    assert {_bytes(piece) for piece in reference.get_vocab()} == set(one.pieces)


@pytest.mark.parametrize("name", sorted(PATTERNS))
@settings(max_examples=150, deadline=None)
@given(text=st.text() | st.text("aB1 '’\n\r\t.sſKé日\u0301\x1c\x85\u00a0") | st.sampled_from(documents()[:20]))
def test_ids_are_those_of_tiktoken_given_the_same_ranks(name: str, text: str) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is the reference encoder")
    ranks = {piece: i for i, piece in enumerate(ours(name).pieces)}
    reference = tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens={})
    assert ours(name).encode(text) == reference.encode_ordinary(text)


def _bytes(piece: str) -> bytes:
    """The bytes of a piece in GPT-2's visible alphabet: printable Latin-1 is itself, the rest U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
    return bytes(alphabet[character] for character in piece)
