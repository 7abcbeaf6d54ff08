"""A Hugging Face tokenizer.json run by its own library (`tokenizers`, the extra `hf`), with the manners of the others.

The file's text is the tokenizer: it is what is saved and what the fingerprint is taken over. We add three things.

- Text never becomes a special token. The library would read `</s>` in a text as the token; in the copy that `encode`
  uses, special tokens are not looked for, and their names are no pieces of the model.
- Bytes. The library decodes to text, so half a character is lost; we read the bytes of each piece off its name:
  ByteLevel's alphabet, or `<0xE2>` and U+2581 for a space (byte fallback, Metaspace). Decoders of another kind
  (WordPiece, ...) are left to the library.
- Nothing is cut off or filled up: the file's truncation and padding are not used.

How much comes back. `decode(encode(text)) == text` for byte-level BPE without a normalizer, and for byte fallback with
at most a space put in front of the text (then `token_bytes` of a text add up to one byte more). It can't where the
file itself rewrites text: lower case, Unicode normal forms, WordPiece, unknown tokens. There `encode` gives the file's
ids and `decode` the library's text, and `lossless` is false.

The file decides. Some classes of transformers (LlamaTokenizer, Qwen2Tokenizer) take vocabulary and merges from it and
build the rest anew; where a file says otherwise than its class, they differ from us and from the library.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self, cast

from sky_core.errors import DataError, UserError
from sky_core.files import write_atomic
from sky_core.tokenizer.base import MOST_IDS, Span, Tokenizer, utf8
from sky_core.tokenizer.files import FILE, FORMAT, read_chat_template, read_tokenizer
from sky_core.tokenizer.huggingface_decoder import reading

COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files beside a Hugging Face tokenizer.json that are kept as they were read, to be written back."""
HIDDEN = "\U0010ffff"
PROBE = " a  B\t \n\n Å ﬁ ① e\u0301 日本 😀."


def library() -> Any:
    """The package `tokenizers`. Raises `UserError` where it is missing."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "a Hugging Face tokenizer.json needs the package tokenizers: pip install 'sky-core[hf]'"
        ) from None
    return tokenizers


def parse(text: str) -> dict[str, Any]:
    """The content of a tokenizer.json. Raises `DataError` when it is damaged or of another format."""
    try:
        definition = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is damaged ({error}); get it again") from None
    if isinstance(definition, dict) and definition.get("format") == FORMAT:
        raise DataError("it is skyGPT's own format, which needs no import: use {kind: saved, path: FOLDER}")
    model = definition.get("model") if isinstance(definition, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise DataError("it is no Hugging Face tokenizer.json (no 'model' with a 'vocab')")
    return cast("dict[str, Any]", definition)


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json given as text.

    `names` are further special tokens of its vocabulary, `end_of_text` and `bos` are special tokens by name,
    `prompt_prefix` ids. `companions` maps names of COMPANIONS to their text. Raises `DataError` when the library
    cannot read the file or the file has no such tokens.
    """

    kind = "huggingface"

    def __init__(
        self,
        text: str,
        names: Sequence[str] = (),
        end_of_text: str | None = None,
        bos: str | None = None,
        prompt_prefix: Sequence[int] = (),
        companions: Mapping[str, str] | None = None,
    ) -> None:
        self.text, self.end_of_text_name, self.bos_name = text, end_of_text, bos
        self.names = sorted(names)
        self.companions = dict(companions or {})
        self._prefix = tuple(prompt_prefix)
        self._definition = parse(text)
        self._engine = make_engine(text, self.names)
        vocab: dict[str, int] = self._engine.get_vocab(with_added_tokens=True)
        if missing := [name for name in (*names, end_of_text, bos) if name is not None and name not in vocab]:
            raise DataError(f"the special token {missing[0]!r} is not in its vocabulary: use files of one tokenizer")
        for token in self._definition.get("added_tokens", []):
            if (i := vocab.get(token["content"])) != token["id"]:
                raise DataError(
                    f"its added token {token['content']!r} has the id {token['id']}, the package tokenizers gives it "
                    f"{i}: the ids have gaps; put the token into the model's vocabulary"
                )
        added = self._engine.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in sorted(added.items()) if token.special}
        self._vocab_size = max(vocab.values(), default=-1) + 1
        if self._vocab_size > MOST_IDS:
            raise DataError(f"it has the id {self._vocab_size - 1:,}, more than any model has; the file is damaged")
        self._names = {i: name for name, i in vocab.items()}
        self._literal = {i for i, token in added.items() if not token.special}
        self._reading = reading(self._definition.get("decoder"))
        self._guarded = set(self.special.values()) - {vocab.get(unknown(self._definition["model"]) or "", -1)}

    @cached_property
    def _plain(self) -> Any:
        """The engine to which the name of a special token is text like any other."""
        model = self._definition["model"]
        hidden = self.special.keys() - {unknown(model)}

        def rename(name: str) -> str:
            return f"{HIDDEN}{name}{HIDDEN}" if name in hidden else name

        vocab = model["vocab"]
        if model.get("type") == "Unigram":
            vocab = [[rename(name), score] for name, score in vocab]
        elif model.get("type") != "BPE" or model.get("ignore_merges"):
            vocab = {rename(name): i for name, i in vocab.items()}
        if vocab == model["vocab"]:
            engine = make_engine(self.text, self.names)
        else:
            added = [
                {**token, "content": rename(token["content"])} for token in self._definition.get("added_tokens", [])
            ]
            engine = make_engine(
                json.dumps(
                    {
                        **self._definition,
                        "added_tokens": added,
                        "post_processor": None,
                        "model": {**model, "vocab": vocab},
                    }
                )
            )
        engine.encode_special_tokens = True
        return engine

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def bos(self) -> int | None:
        return None if self.bos_name is None else self.special[self.bos_name]

    @property
    def prompt_prefix(self) -> tuple[int, ...]:
        return self._prefix

    @cached_property
    def lossless(self) -> bool:
        """Whether a text with all that tokenizers usually lose comes back exactly."""
        return self.decode(self.encode(PROBE)) == PROBE

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, nothing added. Raises `UserError` for what would become a special token all the same."""
        utf8(text)
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if not self._guarded.isdisjoint(ids):
            name = next(self._names[i] for i in ids if i in self._guarded)
            raise UserError(f"this tokenizer cannot write the text {name!r} other than as its special token")
        return ids

    def encode_with_special(self, text: str) -> list[int]:
        utf8(text)
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def encode_spans(self, text: str) -> list[Span]:
        """As of every tokenizer, but a token that is a part of a character is given the place of the whole."""
        utf8(text)
        places = [0, *accumulate(len(character.encode()) for character in text)]
        found = self._engine.encode(text, add_special_tokens=False)
        return [(i, places[start], places[end]) for i, (start, end) in zip(found.ids, found.offsets, strict=True)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        numbers = list(map(operator.index, ids))
        outside = next((i for i in numbers if not 0 <= i < self.vocab_size), None)
        if outside is not None:
            raise UserError(f"token id {outside} is none of this tokenizer's 0..{self.vocab_size - 1}")
        if self._reading is None:
            text: str = self._engine.decode(numbers, skip_special_tokens=True)
            return text.encode()
        data = b"".join([self._pieces[i] for i in numbers])
        return data.removeprefix(b" ") if self._reading.strips_space else data

    def piece_bytes(self, token: int) -> bytes:
        return self._pieces[token]

    @cached_property
    def _pieces(self) -> list[bytes]:
        special = set(self.special.values())
        return [b"" if i in special or i not in self._names else self._bytes_of(i) for i in range(self.vocab_size)]

    def _bytes_of(self, i: int) -> bytes:
        name = self._names[i]
        if self._reading is None:  # what the library writes for it behind another token
            before: str = self._engine.decode([self._anchor], skip_special_tokens=False)
            both: str = self._engine.decode([self._anchor, i], skip_special_tokens=False)
            return both.removeprefix(before).encode()
        if self._reading.literal_added_tokens and i in self._literal:
            return name.encode()
        return self._reading.read(name)

    @cached_property
    def _anchor(self) -> int:
        return next(i for i, name in sorted(self._names.items()) if i not in self._guarded and name.isalnum())

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "names": self.names,
            "end_of_text": self.end_of_text_name,
            "bos": self.bos_name,
            "prompt_prefix": list(self._prefix),
            "json": self.text,
        }

    def to_huggingface(self) -> dict[str, Any]:
        return self._definition

    def save(self, folder: Path) -> None:
        """As every tokenizer, and the files that came with the tokenizer.json as they were."""
        super().save(folder)
        for name, text in self.companions.items():
            write_atomic(folder / name, text)

    @classmethod
    def load(cls, folder: Path) -> Self:
        definition = read_tokenizer(folder)
        try:
            tokenizer = cls._from_dict(definition, read_companions(folder))
        except DataError as error:
            raise DataError(f"{folder / FILE}: {error}") from None
        tokenizer.chat_template = read_chat_template(folder)
        return tokenizer

    @classmethod
    def _from_dict(cls, definition: dict[str, Any], companions: dict[str, str]) -> Self:
        return cls(
            definition["json"],
            definition["names"],
            definition["end_of_text"],
            definition["bos"],
            definition["prompt_prefix"],
            companions,
        )

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[Any, ...], dict[str, Any]]:
        return type(self)._from_dict, (self.as_dict(), self.companions), {"chat_template": self.chat_template}


def make_engine(text: str, names: Sequence[str] = ()) -> Any:
    """The library's tokenizer, with `names` special. Raises `DataError` when it cannot read `text`."""
    try:
        engine = library().Tokenizer.from_str(text)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself, whatever is wrong
        raise DataError(f"the package tokenizers cannot read it: {' '.join(str(error).split())}") from None
    vocab = engine.get_vocab(with_added_tokens=True)
    special = {token.content for token in engine.get_added_tokens_decoder().values() if token.special}
    engine.add_special_tokens([name for name in names if name in vocab and name not in special])
    engine.no_truncation()
    engine.no_padding()
    return engine


def read_companions(folder: Path) -> dict[str, str]:
    """The files of COMPANIONS in `folder`, byte for byte. Raises `DataError` when one is no text."""
    found = {}
    for name in COMPANIONS:
        try:
            found[name] = (folder / name).read_bytes().decode()
        except FileNotFoundError:
            continue
        except UnicodeDecodeError as error:
            raise DataError(f"{folder / name} is damaged: not UTF-8 (byte {error.start}); get it again") from None
    return found


def unknown(model: Mapping[str, Any]) -> str | None:
    """The token that stands for what the model has no piece for, if it has one."""
    if isinstance(i := model.get("unk_id"), int):
        name: str = model["vocab"][i][0]
        return name
    return model.get("unk_token")
