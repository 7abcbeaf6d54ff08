"""Special tokens and files of other programs: ids by name only where that is asked for, bad files explained."""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sky_core.cli.tokenizer import tokenizer as command
from sky_core.components.tokenizer import Bpe, Byte, Char, Saved, SentencePiece, Tiktoken
from sky_core.errors import DataError, UserError
from sky_core.tokenizer.base import END_OF_TEXT, Tokenizer
from sky_core.tokenizer.bpe import BpeTokenizer, merge
from sky_core.tokenizer.byte_level import from_visible, to_visible
from sky_core.tokenizer.files import load_tokenizer
from sky_core.tokenizer.pattern import for_oniguruma
from sky_core.tokenizer.tiktoken import TiktokenTokenizer, read_ranks

NAMES = ["<|user|>", "<|user|>!", "<|assistant|>"]
CORPUS = [
    "the dog and the log; <|user|> says: é ☃ 日本 \n\n 12345 " * 4,
    "some other words that a small vocabulary can be learned from, none of them rare: there, here, where, nowhere; ",
]
COMPONENTS = {
    "char": Char(special=NAMES),
    "byte": Byte(special=NAMES),
    "bpe": Bpe(vocab_size=300, special=NAMES),
    "sentencepiece": SentencePiece(vocab_size=300, special=NAMES),
}
Get = Callable[[str], Tokenizer]


@pytest.fixture(scope="module")
def tokenizer() -> Get:
    built: dict[str, Tokenizer] = {}

    def get(kind: str) -> Tokenizer:
        if kind == "sentencepiece":
            pytest.importorskip("sentencepiece", reason="SentencePiece is an extra")
        if kind not in built:
            built[kind] = COMPONENTS[kind].train(CORPUS)
        return built[kind]

    return get


each_kind = pytest.mark.parametrize("kind", sorted(COMPONENTS))


@each_kind
def test_names_are_tokens_only_where_that_is_asked_for(tokenizer: Get, kind: str) -> None:
    one = tokenizer(kind)
    text = "a<|user|>é<|user|>!<|endoftext|><|user"
    special = set(one.special.values())
    assert not special & set(one.encode(text))
    assert one.decode(one.encode(text)) == text
    ids = one.encode_with_special(text)
    assert [i for i in ids if i in special] == [one.special[name] for name in (*NAMES[:2], END_OF_TEXT)]
    assert one.decode(ids) == "aé<|user", "the longest name that fits, and names have no text"


@each_kind
@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.sampled_from([*NAMES, END_OF_TEXT]) | st.text("ab <|user>é☃", max_size=6), max_size=8))
def test_spans_tile_the_text(tokenizer: Get, kind: str, parts: list[str]) -> None:
    one, text = tokenizer(kind), "".join(parts)
    spans = one.encode_spans(text)
    assert [i for i, _, _ in spans] == one.encode_with_special(text)
    assert [0, *(end for _, _, end in spans)] == [*(start for _, start, _ in spans), len(text.encode())]
    data = text.encode()
    names = {i: name.encode() for name, i in one.special.items()}
    assert all(data[start:end] == names.get(i, one.piece_bytes(i)) for i, start, end in spans)


@each_kind
def test_they_are_saved_pickled_and_change_the_fingerprint(tokenizer: Get, kind: str, tmp_path: Path) -> None:
    one = tokenizer(kind)
    one.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(one))):
        assert copy.special == one.special
        assert copy.fingerprint == one.fingerprint
        assert copy.encode_with_special("a<|user|>b") == one.encode_with_special("a<|user|>b")
    plain = COMPONENTS[kind].model_copy(update={"special": []}).train(CORPUS)
    assert plain.fingerprint != one.fingerprint


def test_a_tokenizer_without_them_is_what_it_was() -> None:
    """Fingerprints and options as version 0.1.0 wrote them: data and checkpoints made then are still recognised."""
    assert Byte().train([]).fingerprint == "cd6f37fb8557e254"
    assert Char().train(["abc"]).as_dict() == {
        "kind": "char", "characters": "abc", "byte_fallback": True, "end_of_text": True,
    }  # fmt: skip
    assert Bpe().as_dict() == {"kind": "bpe", "vocab_size": 8192, "pattern": "gpt4", "end_of_text": True}
    assert Byte(special=["<a>"], chat_template="chatml").as_dict() == {
        "kind": "byte", "chat_template": "chatml", "end_of_text": True, "special": ["<a>"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "message"),
    [(["<a>", "<a>"], "'<a>' is there twice"), ([END_OF_TEXT], "is there twice"), ([""], "without a name")],
)
def test_a_wrong_list_of_names_is_explained(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Byte(special=names).train([])


def test_a_vocabulary_without_room_for_them_is_refused() -> None:
    with pytest.raises(UserError, match="the 256 bytes and special tokens alone take 260"):
        Bpe(vocab_size=258, special=NAMES).train(CORPUS)


# tiktoken


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items()))
    return path


def ranks_of(one: BpeTokenizer) -> dict[bytes, int]:
    """The ranks that a trained tokenizer stands for, its bytes in another order."""
    return {piece: i if i > 255 else 255 - i for i, piece in enumerate(one.pieces) if piece}


@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.text("the dog12 é\n"))
def test_ranks_of_learned_merges_cut_text_as_the_merges_do(text: str) -> None:
    one = BpeTokenizer.train(CORPUS, 300)
    given = TiktokenTokenizer(ranks_of(one))
    assert [given.pieces[i] for i in given.encode(text)] == [one.pieces[i] for i in one.encode(text)]


def test_a_pretoken_that_is_a_piece_is_one_token_even_if_no_merge_leads_there() -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"abcd": 256}
    assert TiktokenTokenizer(ranks).encode("abcd abcde") == [256, ord(" "), *b"abcde"]


def test_a_symbol_that_was_merged_away_spells_nothing() -> None:
    """`xa` goes first and takes the a of `ab`, which has the last id but one: Python's pieces[-2]."""
    names = [bytes([i]) for i in range(256) if i not in b"az"] + [b"xa", b"ab", b"a", b"z"]
    one = TiktokenTokenizer({piece: i for i, piece in enumerate(names)}, special=[], end_of_text=None)
    assert [one.pieces[i] for i in one.encode("xab")] == [b"xa", b"b"]


def test_equal_ways_to_spell_a_piece_go_from_left_to_right() -> None:
    class Spelled:
        def get(self, pair: tuple[int, int]) -> int | None:
            return {2: 2, 3: 3}.get(sum(pair))

    assert merge([1, 1, 1, 1, 1], Spelled()) == [2, 3]


def test_a_rank_file_is_read_saved_and_loaded(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "one.tiktoken", ranks_of(BpeTokenizer.train(CORPUS, 300)))
    special = {"<|end|>": 310, "<|user|>": 305}
    one = Tiktoken(path=str(path), pattern="llama3", special=special, end_of_text="<|end|>").train([])
    assert (one.vocab_size, one.end_of_text) == (311, 310)
    assert one.encode_with_special("a<|user|>")[-1] == 305
    assert one.decode_bytes([303]) == b"", "an id that no piece has"
    one.save(tmp_path / "saved")
    path.unlink()
    assert Saved(path=str(tmp_path / "saved")).train([]).fingerprint == one.fingerprint
    numbered = TiktokenTokenizer({bytes([i]): i for i in range(256)}, special=["<a>", END_OF_TEXT])
    assert numbered.special == {"<a>": 256, END_OF_TEXT: 257}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\nYg== x\n", "line 2 is no new base64 piece and its rank: 'Yg== x'"),
        (b"YQ== 0\nYQ== 1\n", "line 2"),
        (b"\xff\xfe 1\n", "line 1"),
        (b"not base64!\n", "line 1"),
        (b"YQ== 0\nYg== 0\n", "ranks must be different"),
        (b"YQ== 999999999999\n", "ranks must be different, from 0 to"),
        (b"YQ== 0\n", "255 of the 256 bytes have no rank"),
        (b"", "256 of the 256 bytes"),
    ],
)
def test_a_damaged_rank_file_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "odd.tiktoken"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as problem:
        read_ranks(path)
    assert str(path) in str(problem.value)
    with pytest.raises(DataError, match="no rank file at"):
        read_ranks(tmp_path / "absent.tiktoken")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"special": {"<a>": 7}, "end_of_text": None}, "'<a>' cannot have the id 7; ids from 256 on are free"),
        ({"special": {"<a>": 300, "<b>": 300}, "end_of_text": None}, "'<b>' cannot have the id 300"),
        ({"special": ["<a>"]}, r"end_of_text: '<\|endoftext\|>' is none of the special tokens \(<a>\)"),
    ],
)
def test_special_tokens_that_clash_with_ranks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TiktokenTokenizer({bytes([i]): i for i in range(256)}, **options)


# Hugging Face's alphabet and patterns


@given(piece=st.binary())
def test_bytes_as_visible_characters_come_back(piece: bytes) -> None:
    assert from_visible(to_visible(piece)) == piece
    assert to_visible(piece).isprintable()


def test_a_space_and_a_newline_look_as_in_gpt2() -> None:
    assert to_visible(b" a\n") == "ĠaĊ"
    assert from_visible("日") == "日".encode(), "no visible byte: an added token"


@pytest.mark.parametrize(
    "pattern", [r"\p{N}{1,3}+|[^0-9]+", r"\s+$|\S+|\s", r"(?s:.)+", r"^a|[\s\S]", r"[a-z--[aeiou]]|."]
)
def test_a_pattern_that_their_engine_reads_otherwise_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="read in another way"):
        for_oniguruma(pattern)


def test_a_plain_pattern_is_handed_on() -> None:
    assert for_oniguruma(r"\p{L}+|[^\p{L}]+") == r"\p{L}+|[^\p{L}]+"


def test_what_their_format_cannot_hold_is_refused_and_nothing_written(tmp_path: Path) -> None:
    from sky_core.tokenizer.huggingface import write_huggingface

    out = tmp_path / "out"
    one = BpeTokenizer.train([" ab" * 9], 259, special=["Ġa"])
    with pytest.raises(UserError, match="are both written 'Ġa'"):
        write_huggingface(one, out)
    with pytest.raises(UserError, match="read in another way"):
        write_huggingface(BpeTokenizer.train(["ab"], 257, pattern=r"\S+$|(?s:.)", end_of_text=False), out)

    class Foreign(type(Byte().train([]))):  # type: ignore[misc]
        kind = "foreign"
        to_huggingface = Tokenizer.to_huggingface

    with pytest.raises(UserError, match="the tokenizer kind 'foreign' has no Hugging Face form"):
        write_huggingface(Foreign(), out)
    assert not out.exists()


# The command


def run(*arguments: str | Path) -> Any:
    from click.testing import CliRunner

    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_the_command_trains_with_special_tokens_imports_ranks_and_exports(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(CORPUS[0])
    made = run(
        "train", tmp_path / "a.txt", "--vocab-size", "280", "--special", "<|im_start|>", "--special", "<|im_end|>",
        "--chat-template", "chatml", "--json", "--out", tmp_path / "made",
    )  # fmt: skip
    assert made.exit_code == 0, made.exception
    assert json.loads(made.stdout)["special"] == {END_OF_TEXT: 277, "<|im_start|>": 278, "<|im_end|>": 279}
    assert json.loads(made.stdout)["chat_template"] is True

    done = run("export", tmp_path / "made", "--hf", tmp_path / "hf", "--max-length", "64")
    assert done.exit_code == 0, done.exception
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["model_max_length"]) == (END_OF_TEXT, 64)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == load_tokenizer(tmp_path / "made").chat_template
    again = run("export", tmp_path / "made", "--hf", tmp_path / "hf")
    assert isinstance(again.exception, UserError)

    path = write_ranks(tmp_path / "tokenizer.model", ranks_of(BpeTokenizer.train(CORPUS, 300)))
    taken = run("import", path, "--special", END_OF_TEXT, "-o", "pattern=llama3", "--json", "--out", tmp_path / "taken")
    assert taken.exit_code == 0, taken.exception
    assert json.loads(taken.stdout)["kind"] == "tiktoken"
    assert load_tokenizer(tmp_path / "taken").decode(load_tokenizer(tmp_path / "taken").encode("the dog")) == "the dog"


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"YQ== 0", "a.tiktoken", "255 of the 256 bytes"),
        (b"nothing", "tokenizer.model", "no SentencePiece model"),
        (b"{", "tokenizer.json", "tokenizer.json: it is damaged"),
        (b"[1]", "tokenizer.json", "no Hugging Face tokenizer.json"),
        (b'{"format": "sky-tokenizer"}', "tokenizer.json", "needs no import"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "tokenizer.json", "cannot read it"),
        (b"\xff", "tokenizer.json", "not UTF-8"),
    ],
)
def test_the_command_explains_a_file_that_it_cannot_import(
    tmp_path: Path, content: bytes, name: str, message: str
) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is an extra")
    pytest.importorskip("sentencepiece", reason="SentencePiece is an extra")
    (tmp_path / name).write_bytes(content)
    result = run("import", tmp_path / name, "--out", tmp_path / "out")
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "out").exists()
