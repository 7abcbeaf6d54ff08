"""The contract of a tokenizer: text to ids and back without loss, whatever the text, and a fingerprint that travels."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import ClassVar

import pytest

from sky_core.errors import UserError
from sky_core.slots import Tokenizer
from sky_core.testing.component import ComponentContract
from sky_core.testing.workbench import TEXT
from sky_core.tokenizer.base import Tokenizer as BuiltTokenizer

NASTY = {
    "empty": "",
    "one space": " ",
    "white space": "  \t\t \n\n\n \r\n\r \v\f  end  ",
    "leading and trailing spaces": "   a   ",
    "no-break and ideographic spaces": "a\u00a0b\u2003c\u3000d\u200be",
    "control characters": "\x00\x01\x1b[31m\x7f\x85",
    "contractions and digits": "I'll we've 1234567890 3.14159 0x1F 1,000,000",
    "code": "def f(x):\n\treturn {'a': [x ** 2, ...]}  # \\n\n",
    "accents, composed and not": "naïve cafe\u0301 Å A\u030a \u1e69 s\u0323\u0307",
    "right to left": "שלום \u202eעולם\u202c مرحبا بالعالم ١٢٣",
    "no spaces": "日本語のテキストと中文文本ไทยไม่มีช่องว่าง",
    "joined emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☃️",
    "beyond the basic plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff \ufffd \ufeff",
    "looks like special tokens": "<|endoftext|> <s> </s> <unk> [CLS] <0x41> ▁word Ġword",
    "a long run": "a" * 300 + " " * 300,
    "ligatures and full width": "ﬁ ﬀ ｆｕｌｌ Ⅷ ½ ²",
}
"""What breaks tokenizers: each is to come back exactly."""

CORPUS = [TEXT, *NASTY.values(), TEXT * 3]
"""What tokenizers under test are trained on."""


class TokenizerContract(ComponentContract):
    """A tokenizer. `component.train` is given `corpus`; nothing is read from disk but what the tokenizer saved."""

    base = Tokenizer
    corpus: ClassVar[list[str]] = CORPUS
    """Documents to train on."""
    any_text: ClassVar[bool] = True
    """Represents every Unicode text; if not, text with an unseen character is refused with a `UserError`."""

    trained: ClassVar[BuiltTokenizer]

    @pytest.fixture
    def tokenizer(self) -> BuiltTokenizer:
        """The tokenizer trained on `corpus`, once for all tests of a class: a tokenizer does not change."""
        if "trained" not in vars(type(self)):
            type(self).trained = self.component.train(iter(self.corpus))
        return self.trained

    @pytest.mark.parametrize("name", NASTY)
    def test_text_comes_back_exactly(self, tokenizer: BuiltTokenizer, name: str) -> None:
        ids = tokenizer.encode(NASTY[name])
        assert tokenizer.decode(ids) == NASTY[name]
        assert all(0 <= i < tokenizer.vocab_size for i in ids)

    def test_any_text_comes_back_exactly(self, tokenizer: BuiltTokenizer) -> None:
        hypothesis = pytest.importorskip("hypothesis", reason="hypothesis draws the texts")
        alphabet = None if self.any_text else sorted(set("".join(self.corpus)))
        characters = hypothesis.strategies.characters(exclude_categories=["Cs"]) if alphabet is None else alphabet

        @hypothesis.settings(max_examples=100, deadline=None, database=None)
        @hypothesis.given(hypothesis.strategies.text(characters))
        def comes_back(text: str) -> None:
            assert tokenizer.decode(tokenizer.encode(text)) == text

        comes_back()

    def test_an_unseen_character_is_refused_or_represented(self, tokenizer: BuiltTokenizer) -> None:
        if self.any_text:
            assert tokenizer.decode(tokenizer.encode("ꙮ \U0001f9ff")) == "ꙮ \U0001f9ff"
        else:
            with pytest.raises(UserError, match="ꙮ"):
                tokenizer.encode("ꙮ")

    def test_a_lone_surrogate_is_no_text(self, tokenizer: BuiltTokenizer) -> None:
        with pytest.raises(UserError):
            tokenizer.encode("a\ud800b")

    def test_ids_stand_for_bytes_that_add_up(self, tokenizer: BuiltTokenizer) -> None:
        lengths = tokenizer.token_bytes()
        assert len(lengths) == tokenizer.vocab_size
        for text in self.corpus:
            ids = tokenizer.encode(text)
            assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()
            assert sum(lengths[i] for i in ids) == len(text.encode())

    def test_a_cut_through_a_character_decodes_to_a_replacement(self, tokenizer: BuiltTokenizer) -> None:
        for cut in range(len(ids := tokenizer.encode(NASTY["joined emoji"]))):
            tokenizer.decode(ids[:cut])

    def test_special_tokens_have_ids_and_no_text(self, tokenizer: BuiltTokenizer) -> None:
        ids = list(tokenizer.special.values())
        assert len(set(ids)) == len(ids)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == ""
        assert all(tokenizer.token_bytes()[i] == 0 for i in ids)

    def test_text_never_becomes_a_special_token(self, tokenizer: BuiltTokenizer) -> None:
        reserved = set(tokenizer.special.values())
        for text in [*self.corpus, *(f"a{name}b" for name in tokenizer.special if self.any_text)]:
            assert not reserved & set(tokenizer.encode(text))

    def test_a_special_token_is_read_by_its_name_where_that_is_asked_for(self, tokenizer: BuiltTokenizer) -> None:
        for name, i in tokenizer.special.items():
            assert tokenizer.encode_with_special(f"{TEXT[:4]}{name}{TEXT[:4]}").count(i) == 1
        assert tokenizer.encode_with_special(TEXT) == tokenizer.encode(TEXT)

    def test_places_of_tokens_tile_the_text(self, tokenizer: BuiltTokenizer) -> None:
        text = "".join(f"{name}{TEXT}" for name in tokenizer.special) or TEXT
        spans = tokenizer.encode_spans(text)
        assert [i for i, _, _ in spans] == tokenizer.encode_with_special(text)
        assert [*(start for _, start, _ in spans), len(text.encode())] == [0, *(end for _, _, end in spans)]

    def test_the_chat_template_is_saved_and_changes_no_id(self, tokenizer: BuiltTokenizer, tmp_path: Path) -> None:
        copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 (our own bytes)
        copy.chat_template = "{{ messages[0].content }}"
        copy.save(tmp_path)
        loaded = type(self.component).load(tmp_path)
        assert loaded.chat_template == copy.chat_template
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.render_chat([{"role": "user", "content": TEXT}]) == TEXT

    def test_a_batch_encodes_as_its_texts_do(self, tokenizer: BuiltTokenizer) -> None:
        assert tokenizer.encode_batch(self.corpus) == [tokenizer.encode(text) for text in self.corpus]

    def test_saved_and_loaded_it_is_the_same(self, tokenizer: BuiltTokenizer, tmp_path: Path) -> None:
        tokenizer.save(tmp_path)
        loaded = type(self.component).load(tmp_path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.special == tokenizer.special
        assert loaded.encode_batch(self.corpus) == tokenizer.encode_batch(self.corpus)
        assert [loaded.decode_bytes([i]) for i in range(loaded.vocab_size)] == [
            tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)
        ]

    def test_it_travels_to_worker_processes(self, tokenizer: BuiltTokenizer) -> None:
        copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 (our own bytes)
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode(TEXT) == tokenizer.encode(TEXT)

    def test_training_twice_gives_the_same_tokenizer(self, tokenizer: BuiltTokenizer) -> None:
        assert self.component.train(iter(self.corpus)).fingerprint == tokenizer.fingerprint

    def test_the_kind_travels_with_the_tokenizer(self, tokenizer: BuiltTokenizer) -> None:
        assert tokenizer.kind == self.component.kind
