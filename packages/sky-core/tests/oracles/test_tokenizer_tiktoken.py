"""Rank files against tiktoken itself, given the same ranks: id for id, special tokens included."""

from __future__ import annotations

import os
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sky_core.tokenizer.bpe import BpeTokenizer
from sky_core.tokenizer.pattern import PATTERNS
from sky_core.tokenizer.tiktoken import TiktokenTokenizer

SPECIAL = {"<|endoftext|>": 1200, "<|im_start|>": 1100, "<|im_start|>x": 1101}
NON_LATIN = (
    "Größe naïve Привет 日本語、中文 ١٢٣ 😀\U0001f469\u200d\U0001f467 \r\n\u00a0\u3000\u2028 I'LL don't \x00\x1c\x85ſ\n"
)


@cache
def documents() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [*(path.read_text(encoding="utf-8") for path in files[:12]), NON_LATIN * 20]


@cache
def ranks() -> dict[bytes, int]:
    """Learned ranks, with pieces that no merge leads to, as Llama 3's have."""
    learned = BpeTokenizer.train(documents(), 1000, end_of_text=False).pieces
    odd = [b" import sys", b"abcdefgh", "日本語".encode(), b"zzzz"]
    return {piece: i for i, piece in enumerate([*learned, *(piece for piece in odd if piece not in learned)])}


@cache
def pair(name: str) -> tuple[TiktokenTokenizer, Any]:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is the reference encoder")
    pattern = PATTERNS[name]
    theirs = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks(), special_tokens=SPECIAL)
    return TiktokenTokenizer(ranks(), pattern=name, special=SPECIAL), theirs


text_of = st.text() | st.text("aB1z '’\n\r\tſKé日\u0301\x1c\x85\u00a0", max_size=60) | st.sampled_from(documents())


@pytest.mark.parametrize("name", sorted(PATTERNS))
@settings(max_examples=60, deadline=None)
@given(text=text_of)
def test_ids_are_those_of_tiktoken(name: str, text: str) -> None:
    ours, theirs = pair(name)
    ids = ours.encode(text)
    assert ids == theirs.encode_ordinary(text)
    assert ours.decode_bytes(ids) == theirs.decode_bytes(ids) == text.encode()


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from([*SPECIAL, " import sys", "zzzz"]) | st.text("<|im_star>x ", max_size=9)))
def test_special_tokens_are_found_as_tiktoken_finds_them(parts: list[str]) -> None:
    ours, theirs = pair("gpt4")
    text = "".join(parts).replace("<|im_start|>x", "<|im_start|>")  # tiktoken takes any of two that begin alike
    assert ours.encode_with_special(text) == theirs.encode(text, allowed_special="all")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranks_that_nobody_learned_are_merged_alike(data: st.DataObject) -> None:
    """Any set of pieces, reachable or not, in any order."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is the reference encoder")
    drawn = data.draw(st.lists(st.text("ab", min_size=2, max_size=5).map(str.encode), unique=True, max_size=20))
    given_ranks = {piece: i for i, piece in enumerate([*(bytes([i]) for i in range(256)), *drawn])}
    theirs = tiktoken.Encoding("drawn", pat_str=PATTERNS["gpt4"], mergeable_ranks=given_ranks, special_tokens={})
    text = data.draw(st.text("ab", max_size=40))
    assert TiktokenTokenizer(given_ranks).encode(text) == theirs.encode_ordinary(text)


def test_real_text_is_cut_as_tiktoken_cuts_it() -> None:
    folder = os.environ.get("SKY_DATA")
    if folder is None:
        pytest.skip("SKY_DATA names no folder with real text")
    text = (Path(folder) / "tinyshakespeare" / "input.txt").read_text()
    for name in ("gpt4", "o200k"):
        ours, theirs = pair(name)
        assert ours.encode(text) == theirs.encode_ordinary(text)
