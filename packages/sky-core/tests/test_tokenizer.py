"""Every tokenizer: text comes back exactly, ids stay what they were on disk, and bad input gets one clear line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sky_core.components.tokenizer import Bpe, Byte, Char, Saved, SentencePiece
from sky_core.errors import DataError, PluginError, UserError
from sky_core.tokenizer.base import END_OF_TEXT, StreamDecoder, Tokenizer
from sky_core.tokenizer.byte import ByteTokenizer
from sky_core.tokenizer.files import load_tokenizer

CORPUS = [
    "def add(a, b):\n\treturn a + b\n\n\nprint(add(1, 2345))  # eine Überprüfung\r\n",
    "The quick brown fox jumps over the lazy dog; THE DOG doesn't mind, it's 12 years old. " * 4,
    "Ångström, A\u030angstro\u0308m: ﬁ ① 日本語 😀 \u2581 \x00 \x7f  ",
]
COMPONENTS = {
    "char": Char(),
    "byte": Byte(),
    "bpe": Bpe(vocab_size=320),
    "bpe-gpt2": Bpe(vocab_size=300, pattern="gpt2", end_of_text=False),
    "bpe-nanochat": Bpe(vocab_size=300, pattern="nanochat"),
    "sentencepiece-unigram": SentencePiece(vocab_size=330),
    "sentencepiece-bpe": SentencePiece(vocab_size=340, model_type="bpe"),
}
NAMES = sorted(COMPONENTS)
Get = Callable[[str], Tokenizer]
text_of = st.text() | st.text(alphabet="ab \n\t\u2581\u2585\ufffd\x00é日<|>endoftext") | st.sampled_from(CORPUS)


@pytest.fixture(scope="module")
def tokenizer() -> Get:
    """The tokenizer of a name in COMPONENTS, trained once on CORPUS."""
    built: dict[str, Tokenizer] = {}

    def get(name: str) -> Tokenizer:
        if name.startswith("sentencepiece"):
            pytest.importorskip("sentencepiece", reason="SentencePiece is an extra")
        if name not in built:
            built[name] = COMPONENTS[name].train(CORPUS)
        return built[name]

    return get


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None)
@given(text=text_of)
def test_any_text_comes_back_with_bytes_that_add_up(tokenizer: Get, name: str, text: str) -> None:
    one = tokenizer(name)
    ids = one.encode(text)
    lengths = one.token_bytes()
    assert one.decode_bytes(ids) == text.encode()
    assert one.decode(ids) == text
    assert sum(lengths[i] for i in ids) == len(text.encode())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streamed_parts_are_whole_characters_and_join_to_the_text(
    tokenizer: Get, name: str, data: st.DataObject
) -> None:
    one = tokenizer(name)
    ids = data.draw(st.lists(st.integers(0, one.vocab_size - 1), max_size=12) | text_of.map(one.encode))
    stream = StreamDecoder(one)
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.finish() == one.decode(ids)


def test_a_streamed_character_appears_with_its_last_byte() -> None:
    stream = StreamDecoder(Byte().train([]))
    assert [stream.push(byte) for byte in "é☃".encode()] == ["", "é", "", "", "☃"]
    assert stream.finish() == ""
    stream.push(0xE2)
    assert stream.finish() == "\ufffd"
    assert stream.push(ord("a")) == "a", "what was unfinished does not leak into the next text"


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_never_come_from_text_and_give_none(tokenizer: Get, name: str) -> None:
    one = tokenizer(name)
    text = "a<|endoftext|>b <unk><s></s><0x41> "
    ids = one.encode(text)
    assert not set(one.special.values()) & set(ids)
    assert one.decode(ids) == text
    assert one.decode([*ids, *one.special.values()]) == text
    assert all(one.token_bytes()[i] == 0 for i in one.special.values())


@pytest.mark.parametrize("name", NAMES)
def test_empty_text_is_no_ids(tokenizer: Get, name: str) -> None:
    assert tokenizer(name).encode("") == []
    assert tokenizer(name).decode([]) == ""


@pytest.mark.parametrize("name", NAMES)
def test_composed_and_decomposed_characters_stay_different(tokenizer: Get, name: str) -> None:
    one = tokenizer(name)
    assert one.encode("é") != one.encode("e\u0301")
    assert one.decode(one.encode("ﬁ①\u00a0Å\u212b")) == "ﬁ①\u00a0Å\u212b"


@pytest.mark.parametrize("name", NAMES)
def test_a_lone_surrogate_is_refused_with_its_place(tokenizer: Get, name: str) -> None:
    with pytest.raises(UserError, match=r"character 2 .*U\+D800.*lone surrogate"):
        tokenizer(name).encode("ab\ud800c")
    if name != "byte":
        with pytest.raises(DataError, match=r"document 1 of the corpus: character 0 .*U\+DFFF"):
            COMPONENTS[name].train(["fine", "\udfff"])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "byte"])
@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_an_empty_corpus_is_refused(tokenizer: Get, name: str, texts: list[str]) -> None:
    tokenizer(name)
    with pytest.raises(DataError, match="holds no text"):
        COMPONENTS[name].train(texts)


@pytest.mark.parametrize("name", NAMES)
def test_training_reads_a_stream_once_and_gives_the_same_again(tokenizer: Get, name: str) -> None:
    expected = tokenizer(name).fingerprint
    assert COMPONENTS[name].train(iter(CORPUS)).fingerprint == expected


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_pickled_it_is_the_same(tokenizer: Get, name: str, tmp_path: Path) -> None:
    one = tokenizer(name)
    one.save(tmp_path / "new" / "folder")
    for other in (load_tokenizer(tmp_path / "new" / "folder"), pickle.loads(pickle.dumps(one))):
        assert type(other) is type(one)
        assert other.fingerprint == one.fingerprint
        assert other.special == one.special
        assert other.encode_batch(CORPUS) == one.encode_batch(CORPUS)
        assert other.token_bytes() == one.token_bytes()
    assert not list((tmp_path / "new" / "folder").glob(".*")), "no temporary file stays"


def test_fingerprints_tell_tokenizers_apart(tokenizer: Get) -> None:
    assert len({tokenizer(name).fingerprint for name in NAMES}) == len(NAMES)
    assert Byte(end_of_text=False).train([]).fingerprint != Byte().train([]).fingerprint
    assert Char(byte_fallback=False).train(CORPUS).fingerprint != tokenizer("char").fingerprint


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outside", [-1, -100, 10**6])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Get, name: str, outside: int) -> None:
    with pytest.raises(UserError, match=f"token id {outside} is none of this tokenizer's 0.."):
        tokenizer(name).decode([0, outside])


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    Bpe(vocab_size=300).train(CORPUS).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["merges"][0], content["merges"][1] = content["merges"][1], content["merges"][0]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="edited or damaged") as problem:
        load_tokenizer(tmp_path)
    assert str(path) in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "sky-tok', "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[]", "is no skyGPT tokenizer"),
        (b'{"model": {"type": "BPE"}}', "is no skyGPT tokenizer"),
        (b'{"format": "sky-tokenizer", "version": 2}', "format version 2"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sky tokenizer train"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_kind_of_a_missing_plugin_is_named(tmp_path: Path) -> None:
    class Foreign(ByteTokenizer):
        kind = "bytes"

    Foreign().save(tmp_path)
    with pytest.raises(PluginError, match=r"no tokenizer called 'bytes'.*did you mean 'byte'"):
        load_tokenizer(tmp_path)


def test_a_saved_tokenizer_is_used_whatever_its_kind(tokenizer: Get, tmp_path: Path) -> None:
    tokenizer("bpe").save(tmp_path)
    assert Saved(path=str(tmp_path)).train([]).fingerprint == tokenizer("bpe").fingerprint


# Characters


def test_characters_are_numbered_by_code_point() -> None:
    one = Char(byte_fallback=False, end_of_text=False).train(["hello", "abc"])
    assert one.vocab_size == len("abcehlo")
    assert one.encode("ache") == [0, 2, 4, 3]
    assert one.end_of_text is None


def test_an_unseen_character_is_spelled_in_bytes_or_named_with_its_place() -> None:
    with_bytes = Char().train(["abc"])
    assert with_bytes.encode("a☃") == [0, 3 + 0xE2, 3 + 0x98, 3 + 0x83]
    assert with_bytes.end_of_text == 3 + 256
    with pytest.raises(UserError, match=r"character 1 of the text, '☃' \(U\+2603\).*byte_fallback: true"):
        Char(byte_fallback=False).train(["abc"]).encode("a☃")


def test_bytes_are_their_own_ids() -> None:
    one = Byte().train([])
    assert one.encode("é") == [0xC3, 0xA9]
    assert (one.vocab_size, one.end_of_text) == (257, 256)
    assert one.special == {END_OF_TEXT: 256}


# SentencePiece


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_corpus_too_small_for_sentencepiece_says_what_it_can_give(model_type: Literal["unigram", "bpe"]) -> None:
    pytest.importorskip("sentencepiece", reason="SentencePiece is an extra")
    with pytest.raises(DataError, match=r"too small for vocab_size 8000: it gives at most \d+ pieces") as problem:
        SentencePiece(vocab_size=8000, model_type=model_type).train(["a few words, a few words"])
    assert "\n" not in str(problem.value)


def test_more_characters_than_pieces_says_how_many_it_takes() -> None:
    pytest.importorskip("sentencepiece", reason="SentencePiece is an extra")
    with pytest.raises(DataError, match=r"vocab_size 300 is too small: .* take 6"):
        SentencePiece(vocab_size=300).train(["".join(map(chr, range(0x4E00, 0x4F80))) * 2])


def test_a_given_model_file_is_loaded_and_not_trained(tokenizer: Get, tmp_path: Path) -> None:
    one = tokenizer("sentencepiece-bpe")
    one.save(tmp_path)
    given = SentencePiece(model=str(tmp_path / "tokenizer.model")).train([])
    assert given.fingerprint == one.fingerprint


def test_a_model_that_rewrites_text_or_is_none_is_refused(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece", reason="SentencePiece is an extra")
    prefix = tmp_path / "default"
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(prefix), vocab_size=80, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(DataError, match=r"default\.model rewrites text"):
        SentencePiece(model=f"{prefix}.model").train([])
    with pytest.raises(DataError, match="no SentencePiece model at"):
        SentencePiece(model=str(tmp_path / "absent.model")).train([])
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"broken\.model: this is no SentencePiece model"):
        SentencePiece(model=str(tmp_path / "broken.model")).train([])


def test_a_model_without_bytes_names_the_character_it_loses(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece", reason="SentencePiece is an extra")
    prefix = tmp_path / "plain"
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["some plain words, some more of them"]),
        model_prefix=str(prefix),
        vocab_size=40,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    one = SentencePiece(model=f"{prefix}.model").train([])
    assert one.decode(one.encode("more words")) == "more words"
    assert one.end_of_text == one.special["</s>"]
    with pytest.raises(UserError, match="loses character 5 of the text, '☃'"):
        one.encode("more ☃ words")


# The command


def test_the_command_trains_and_shows(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from sky_core.cli.tokenizer import tokenizer as command

    (tmp_path / "a.txt").write_text("\n".join(CORPUS[:2]), encoding="utf-8")
    out = tmp_path / "out"
    run = CliRunner().invoke
    trained = run(
        command,
        ["train", str(tmp_path / "a.txt"), "--vocab-size", "300", "-o", "pattern=gpt2", "--json", "--out", str(out)],
    )
    assert trained.exit_code == 0, trained.output
    facts = json.loads(trained.stdout)
    assert (facts["kind"], facts["vocab_size"], facts["documents"]) == ("bpe", 300, 1)
    shown = json.loads(run(command, ["show", str(out), "--text", "the dog", "--json"]).stdout)
    assert shown["fingerprint"] == facts["fingerprint"]
    assert "".join(shown["pieces"]) == "the dog"
    assert shown["bytes_per_token"] == round(7 / shown["tokens"], 3)
    listed = run(command, ["show", str(out), "--text", "-"], input="the dog").stdout
    assert "' dog'" in listed

    again = run(command, ["train", str(tmp_path / "a.txt"), "--out", str(out)])
    assert isinstance(again.exception, UserError)
    assert "--force" in str(again.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "bep"], "no tokenizer called 'bep'.*did you mean 'bpe'"),
        (["-o", "patern=gpt2"], "no option 'patern'; did you mean 'pattern'"),
        (["-o", "pattern=gpt5"], "pattern: no pattern called 'gpt5'"),
        (["--vocab-size", "100"], "vocab_size: .*257, got 100"),
        (["--kind", "saved"], "saved needs the option path"),
        (["-o", "pattern"], "KEY=VALUE"),
    ],
)
def test_the_command_explains_a_wrong_option(tmp_path: Path, arguments: list[str], message: str) -> None:
    from click.testing import CliRunner

    from sky_core.cli.tokenizer import tokenizer as command

    (tmp_path / "a.txt").write_text("text")
    result = CliRunner().invoke(command, ["train", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), *arguments])
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception
    assert not (tmp_path / "out").exists()
