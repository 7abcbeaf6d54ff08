"""Hugging Face folders, both ways: what we write is read by transformers with the same ids, and so is what we read."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sky_core.components import tokenizer as components
from sky_core.tokenizer.base import Tokenizer
from sky_core.tokenizer.bpe import BpeTokenizer
from sky_core.tokenizer.huggingface import read_huggingface, write_huggingface
from sky_core.tokenizer.pattern import PATTERNS
from sky_core.tokenizer.tiktoken import TiktokenTokenizer

transformers = pytest.importorskip("transformers", reason="transformers is the reference reader")
pytest.importorskip("tokenizers", reason="tokenizers is the reference implementation")

NAMES = ["<|user|>", "<|user|>!"]
NASTY = (
    "Größe naïve Привет, мир! 日本語、中文 ١٢٣ 😀\U0001f469\u200d\U0001f467 \r\n\u00a0\u3000\u2028 "
    "I'LL don't \uff21\uff11 \x00\x1c\x85\n  a  \n\n b 12345 ſ'ſ \u212a ▁ a▁b <0x41><0xFF> <s> </s> <unk>  "
)
TEXT = "The quick brown fox jumps over the lazy dog, doesn't it; in 2024 of all years! Then the other one did.\n"
CORPUS = [TEXT * 3, NASTY * 2, "def add(a, b):\n\treturn a + b\n\n\nprint(add(1, 2345))\n" * 3]
text_of = (
    st.text(max_size=40)
    | st.text("theor aB19 '’\n\r\tſKé日\u0301\x1c\x85\u00a0▁<0x41>_", max_size=60)
    | st.sampled_from([*CORPUS, "", " ", "<0x41>", "zzzz\nzzzz zzz"])
)


@cache
def ours(name: str) -> Tokenizer:
    if name.startswith("sentencepiece"):
        pytest.importorskip("sentencepiece", reason="SentencePiece is an extra")
        return components.SentencePiece(vocab_size=345, model_type=name[14:], special=NAMES).train(CORPUS)
    if name.startswith("bpe"):
        return components.Bpe(vocab_size=420, pattern=name[4:], special=NAMES).train(CORPUS)
    if name == "tiktoken":
        pieces = [*BpeTokenizer.train(CORPUS, 400, end_of_text=False).pieces, b" import sys", b"quick brown", b"zzzz"]
        special = {"<|endoftext|>": 409, NAMES[0]: 420, NAMES[1]: 421}
        return TiktokenTokenizer({piece: i for i, piece in enumerate(pieces)}, special=special)
    if name == "char-without-bytes":
        return components.Char(byte_fallback=False, special=NAMES).train(CORPUS)
    return {"char": components.Char(special=NAMES), "byte": components.Byte(special=NAMES)}[name].train(CORPUS)


KINDS = [
    "byte",
    "char",
    "tiktoken",
    "sentencepiece-unigram",
    "sentencepiece-bpe",
    *(f"bpe-{name}" for name in PATTERNS),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """transformers' tokenizer of the folder that we wrote."""
    built: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            write_huggingface(ours(name), folder, max_length=1 << 20)
            built[name] = transformers.AutoTokenizer.from_pretrained(folder)
        return built[name]

    return get


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=text_of)
def test_transformers_gives_the_ids_of_what_we_write(exported: Callable[[str], Any], name: str, text: str) -> None:
    one, theirs = ours(name), exported(name)
    ids = one.encode(text)
    found = theirs(text, split_special_tokens=True).input_ids
    assert found == ids or score(one, found) == pytest.approx(score(one, ids), abs=1e-4)
    assert theirs.decode(ids) == one.decode(ids) == text


def score(one: Tokenizer, ids: list[int]) -> float:
    """Log-probability of a segmentation by a unigram model, whose sums of 32 bits may order equal ones differently."""
    assert one.kind == "sentencepiece"
    return sum(one._processor.get_score(i) for i in ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_mean_the_same_to_transformers(exported: Callable[[str], Any], name: str) -> None:
    one, theirs = ours(name), exported(name)
    text = f"a<|user|>b <|user|>! c<|endoftext|>{TEXT}"
    assert theirs(text).input_ids == one.encode_with_special(text)
    assert theirs.eos_token_id == one.end_of_text
    assert theirs.model_max_length == 1 << 20
    assert max(theirs.get_vocab().values()) + 1 == one.vocab_size
    assert {name: theirs.convert_tokens_to_ids(name) for name in one.special} == one.special
    assert theirs.decode(one.encode_with_special(text), skip_special_tokens=True) == one.decode(
        one.encode_with_special(text)
    )


def test_a_tokenizer_that_refuses_a_character_is_exported_as_one_that_does(exported: Callable[[str], Any]) -> None:
    one, theirs = ours("char-without-bytes"), exported("char-without-bytes")
    assert theirs(NASTY + TEXT, split_special_tokens=True).input_ids == one.encode(NASTY + TEXT)
    assert theirs.decode(one.encode(TEXT)) == TEXT
    with pytest.raises(Exception, match=r"(?i)unk"):
        theirs("ꙮ")


@pytest.mark.parametrize("name", KINDS)
def test_what_we_wrote_we_read(exported: Callable[[str], Any], name: str) -> None:
    one, read = ours(name), read_huggingface(exported(name).name_or_path)
    assert read.special == one.special
    assert (read.vocab_size, read.end_of_text) == (one.vocab_size, one.end_of_text)
    assert (read.lossless, read.prompt_prefix) == (True, ())
    assert read.token_bytes() == one.token_bytes()
    assert read.encode_spans(f"a<|user|>{TEXT}") == one.encode_spans(f"a<|user|>{TEXT}")


def test_real_text_keeps_its_ids(tmp_path: Path) -> None:
    folder = os.environ.get("SKY_DATA")
    if folder is None:
        pytest.skip("SKY_DATA names no folder with real text")
    text = (Path(folder) / "tinyshakespeare" / "input.txt").read_text()[:300_000]
    one = BpeTokenizer.train([text], 2000)
    write_huggingface(one, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text).input_ids == one.encode(text)
