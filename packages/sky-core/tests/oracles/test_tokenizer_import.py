"""Tokenizers as they come from Hugging Face, each built here with its library: the ids, the text and the files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sky_core.components.tokenizer import HuggingFace
from sky_core.errors import DataError, UserError
from sky_core.tokenizer.base import StreamDecoder
from sky_core.tokenizer.files import load_tokenizer
from sky_core.tokenizer.huggingface import read_huggingface, write_huggingface
from sky_core.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from sky_core.tokenizer.pattern import PATTERNS

transformers = pytest.importorskip("transformers", reason="transformers is the reference reader")
library = pytest.importorskip("tokenizers", reason="tokenizers is what runs these files")

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

TEXTS = [
    "The quick brown fox doesn't jump over the lazy dog in 2024.\n",
    "Größe naïve 日本語、中文 😀\U0001f469\u200d\U0001f467 \r\n\tx  y   z \x00",
    "<s>old</s> <unk> [CLS] <|endoftext|> <|eot|> <bos><eos> <0x41>",
    " one leading space",
    "a",
    "",
]
CORPUS = [TEXTS[0] * 3, TEXTS[1] * 3, "one other word and the next " * 4]
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


def train(engine: Any, special: list[str], vocab_size: int = 500, alphabet: list[str] | None = None) -> Any:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False, initial_alphabet=alphabet or []
    )
    engine.train_from_iterator(CORPUS, trainer)
    return engine


def prefixed(engine: Any, name: str) -> Any:
    engine.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, engine.token_to_id(name))]
    )
    return engine


def gpt2() -> Any:
    engine = library.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return train(engine, ["<|endoftext|>"], alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama3() -> Any:
    engine = library.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(library.Regex(PATTERNS["llama3"]), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    engine.decoder = decoders.ByteLevel()
    train(engine, ["<bos>", "<eos>", "<|eot|>"], alphabet=pre_tokenizers.ByteLevel.alphabet())
    engine.add_tokens([AddedToken("lazy dog", normalized=False)])
    return prefixed(engine, "<bos>")


def qwen() -> Any:
    engine = gpt2()
    engine.normalizer = normalizers.NFC()
    return engine


def fallback(engine: Any, special: list[str]) -> Any:
    """A BPE model with byte fallback, out of what was trained without."""
    trained = json.loads(train(engine, [*special, *FALLBACK], 700).to_str())
    trained["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] in special]
    return library.Tokenizer.from_str(json.dumps(trained))


def llama2() -> Any:
    engine = library.Tokenizer(models.BPE())
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return prefixed(fallback(engine, ["<unk>", "<s>", "</s>"]), "<s>")


def gemma() -> Any:
    engine = library.Tokenizer(models.BPE())
    engine.normalizer = normalizers.Replace(" ", "▁")
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return prefixed(fallback(engine, ["<pad>", "<eos>", "<bos>", "<unk>"]), "<bos>")


def mistral() -> Any:
    engine = library.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return prefixed(fallback(engine, ["<unk>", "<s>", "</s>"]), "<s>")


def t5() -> Any:
    engine = library.Tokenizer(models.Unigram())
    engine.normalizer = normalizers.NFKC()
    engine.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    engine.decoder = decoders.Metaspace("▁")
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    engine.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=180, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return engine


def bert() -> Any:
    engine = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    engine.train_from_iterator(CORPUS, trainer)
    engine.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, engine.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    engine.enable_truncation(16)
    engine.enable_padding(length=16)
    return engine


def words() -> Any:
    engine = library.Tokenizer(models.WordLevel(unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    engine.train_from_iterator(CORPUS, trainer)
    return engine


STYLES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "gpt2": (gpt2, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}),
    "llama3": (llama3, {"bos_token": "<bos>", "eos_token": {"content": "<|eot|>", "__type": "AddedToken"}}),
    "qwen": (qwen, {"eos_token": "<|endoftext|>"}),
    "llama2": (llama2, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "gemma": (gemma, {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}),
    "mistral": (mistral, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False}),
    "t5": (t5, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "bert": (bert, {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}),
    "words": (words, {"eos_token": "</s>", "unk_token": "<unk>"}),
}
GAP = json.dumps(
    {
        "added_tokens": [
            {"id": 99, "content": "<s>", "special": True}
            | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        ],
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
)
LOSSLESS = {"gpt2", "llama3", "llama2", "gemma"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    built: dict[str, Path] = {}

    def get(style: str) -> Path:
        if style not in built:
            make, config = STYLES[style]
            built[style] = tmp_path_factory.mktemp(style)
            (built[style] / "tokenizer.json").write_text(make().to_str(pretty=True))
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
            (built[style] / "tokenizer_config.json").write_text(json.dumps(config, indent=3))
        return built[style]

    return get


each_style = pytest.mark.parametrize("style", STYLES)
Folder = Callable[[str], Path]


@each_style
def test_ids_and_text_are_those_of_transformers(folder: Folder, style: str) -> None:
    one, theirs = read_huggingface(folder(style)), transformers.AutoTokenizer.from_pretrained(folder(style))
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False, truncation=False, padding=False).input_ids
        assert one.encode_with_special(text) == ids
        assert one.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        if not any(name in text for name in one.special):
            assert one.encode(text) == ids
    assert one.end_of_text == (theirs.eos_token_id if style != "bert" else theirs.sep_token_id)
    if one.prompt_prefix:
        found = theirs("The dog", truncation=False, padding=False).input_ids
        assert found[: 1 + len(one.encode("The dog"))] == [*one.prompt_prefix, *one.encode("The dog")]
        assert one.bos == one.prompt_prefix[0]


@each_style
def test_text_never_becomes_a_special_token(folder: Folder, style: str) -> None:
    one = read_huggingface(folder(style))
    unknown = {one.special.get(name) for name in ("<unk>", "[UNK]")}
    for text in [*TEXTS, *(f"{name} a{name}b" for name in one.special if one.special[name] not in unknown)]:
        assert not (set(one.special.values()) - unknown) & set(one.encode(text))


@each_style
def test_what_the_file_keeps_comes_back_with_bytes_that_add_up(folder: Folder, style: str) -> None:
    one = read_huggingface(folder(style))
    assert one.lossless == (style in LOSSLESS)
    lengths = one.token_bytes()
    assert len(lengths) == one.vocab_size
    assert all(lengths[i] == 0 for i in one.special.values())
    for text in TEXTS:
        ids = one.encode(text)
        if style in LOSSLESS and "<0x41>" not in text:
            assert one.decode_bytes(ids) == text.encode()
            assert sum(lengths[i] for i in ids) == len(text.encode()) + (style == "llama2" and text != "")


@each_style
def test_a_continuation_is_streamed_with_its_spaces(folder: Folder, style: str) -> None:
    one = read_huggingface(folder(style))
    stream = StreamDecoder(one)
    ids = one.encode("the lazy dog")
    told = "".join(map(stream.push, ids)) + stream.finish()
    assert told.removeprefix(" ") == "the lazy dog"
    assert stream.push(ids[-1]) == one.piece_bytes(ids[-1]).decode()


@each_style
def test_files_come_back_as_they_were_even_through_our_own_format(folder: Folder, style: str, tmp_path: Path) -> None:
    source = folder(style)
    one = HuggingFace(path=str(source / "tokenizer.json")).train([])
    one.save(tmp_path / "ours")
    loaded = load_tokenizer(tmp_path / "ours")
    copy = pickle.loads(pickle.dumps(loaded))
    assert one.fingerprint == loaded.fingerprint == copy.fingerprint
    assert copy.encode(TEXTS[0]) == one.encode(TEXTS[0])
    assert (loaded.prompt_prefix, loaded.bos, loaded.end_of_text) == (one.prompt_prefix, one.bos, one.end_of_text)
    write_huggingface(copy, tmp_path / "theirs", max_length=9)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == files


@pytest.mark.parametrize("place", ["file", "configuration", "list"])
def test_a_chat_template_is_found_where_it_is_kept(folder: Folder, tmp_path: Path, place: str) -> None:
    config = json.loads((folder("gpt2") / "tokenizer_config.json").read_text())
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text("{{ 1 }}\r\n")
    elif place == "configuration":
        config["chat_template"] = "{{ 1 }}\r\n"
    else:
        named = [("tool_use", "{{ 2 }}"), ("default", "{{ 1 }}\r\n")]
        config["chat_template"] = [{"name": name, "template": template} for name, template in named]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((folder("gpt2") / "tokenizer.json").read_bytes())
    one = read_huggingface(tmp_path)
    assert one.chat_template == "{{ 1 }}\r\n"
    write_huggingface(one, tmp_path / "again")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    one.chat_template = "{{ 3 }}"
    write_huggingface(one, tmp_path / "again")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == "{{ 3 }}"


def test_a_token_that_only_the_configuration_calls_special_is_special(folder: Folder, tmp_path: Path) -> None:
    engine = gpt2()
    engine.add_tokens(["<|stop|>"])
    (tmp_path / "tokenizer.json").write_text(engine.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    one = read_huggingface(tmp_path)
    assert one.end_of_text == engine.token_to_id("<|stop|>")
    assert one.end_of_text not in one.encode("a<|stop|>b")
    assert one.end_of_text in one.encode_with_special("a<|stop|>b")
    assert one.decode(one.encode("a<|stop|>b")) == "a<|stop|>b"


def test_without_a_configuration_the_end_of_text_goes_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "any.json").write_text(llama2().to_str())
    one = read_huggingface(tmp_path / "any.json")
    assert (one.end_of_text, one.bos) == (one.special["</s>"], one.special["<s>"])
    assert one.prompt_prefix == (one.bos,)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json in"),
        ({"tokenizer.json": "{"}, r"tokenizer\.json: it is damaged"),
        ({"tokenizer.json": "{}"}, "no Hugging Face tokenizer.json"),
        ({"tokenizer.json": '{"model": {"type": "Magic", "vocab": {}}}'}, "cannot read it"),
        (
            {"tokenizer.json": '{"model": {"type": "WordLevel", "vocab": {"a": 4000000000}, "unk_token": "a"}}'},
            "damaged",
        ),
        ({"tokenizer.json": GAP}, "'<s>' has the id 99, the package tokenizers gives it 1"),
        ({"tokenizer_config.json": "["}, r"tokenizer_config\.json is damaged"),
        ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json is damaged"),
        ({"tokenizer_config.json": '{"eos_token": [3]}'}, r"tokenizer_config\.json is damaged \(eos_token is \[3\]\)"),
        ({"special_tokens_map.json": '{"pad_token": [[]]}'}, r"special_tokens_map\.json is damaged \(pad_token is"),
        ({"tokenizer_config.json": '{"extra_special_tokens": 3}'}, "extra_special_tokens is 3"),
        ({"tokenizer_config.json": '{"additional_special_tokens": [[3]]}'}, "additional_special_tokens is"),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, "chat_template is 3"),
        ({"tokenizer_config.json": '{"chat_template": ["x"]}'}, r"chat_template is \["),
        (
            {"tokenizer_config.json": '{"chat_template": "{% for m in %}"}'},
            r"tokenizer_config\.json: .*no Jinja template",
        ),
        ({"chat_template.jinja": "{% include '/etc/passwd' %}"}, r"chat_template\.jinja: .*forbidden"),
        ({"tokenizer_config.json": '{"eos_token": "<nowhere>"}'}, "'<nowhere>' is not in its vocabulary"),
        ({"tokenizer_config.json": '{"bos_token": "<nowhere>", "add_bos_token": true}'}, "'<nowhere>' is not in"),
    ],
)
def test_a_damaged_folder_is_explained_in_one_line(
    folder: Folder, tmp_path: Path, files: dict[str, str], message: str
) -> None:
    if files and "tokenizer.json" not in files:
        (tmp_path / "tokenizer.json").write_bytes((folder("gpt2") / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as problem:
        read_huggingface(tmp_path)
    assert str(tmp_path) in str(problem.value)
    assert "\n" not in str(problem.value)


def test_ids_and_characters_that_cannot_be_are_refused(folder: Folder) -> None:
    one = read_huggingface(folder("bert"))
    with pytest.raises(UserError, match="none of this tokenizer's"):
        one.decode([one.vocab_size])
    for refuse in (one.encode, one.encode_with_special, one.encode_spans):
        with pytest.raises(UserError, match="lone surrogate"):
            refuse("a\ud800")


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'sky-core\[hf\]'"):
        HuggingFaceTokenizer('{"model": {"vocab": {}}}')
