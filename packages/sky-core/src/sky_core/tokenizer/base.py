"""What every tokenizer is: text to ids and back without loss, with a fingerprint that travels with data and weights."""

from __future__ import annotations

import codecs
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from sky_core.errors import DataError, UserError
from sky_core.tokenizer.files import fingerprint_of, read_chat_template, read_tokenizer, write_tokenizer

END_OF_TEXT = "<|endoftext|>"
"""The special token between documents, unless a tokenizer names another one."""

MOST_IDS = 1 << 24
"""No vocabulary is larger: an id beyond comes of a damaged file, and tables as long would fill the memory."""

Span = tuple[int, int, int]
"""A token in a text: its id, and the UTF-8 bytes from which and up to which it goes."""


class Tokenizer(ABC):
    """`decode(encode(text)) == text` for every string the tokenizer accepts.

    Special tokens have ids but no text: `encode` never produces them from text, `decode` leaves them out. Only
    `encode_with_special` reads their names as tokens: it is for text that a chat template rendered, not for what a
    user typed. A tokenizer is picklable and does not change once made.
    """

    kind: ClassVar[str]
    special: dict[str, int]
    end_of_text_name: str | None = END_OF_TEXT
    chat_template: str | None = None
    """A Jinja template that writes a conversation as text (`sky_core.tokenizer.chat`); set it before training data is
    made of it. It travels with the tokenizer's files and is not part of the fingerprint: it changes no id."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises `sky_core.errors.UserError` naming the first character that it cannot represent."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that `ids` stand for (may end inside a character). Special tokens give nothing."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Everything that defines the tokenizer, `kind` among it, as JSON; what the fingerprint is taken over."""

    def save(self, folder: Path) -> None:
        """Write the files that the component's `load` reads; `tokenizer.json`-style text, never a pickle."""
        write_tokenizer(self, folder)

    def to_huggingface(self) -> dict[str, Any]:
        """The content of a Hugging Face tokenizer.json with the same ids for the same text.

        Raises `UserError` where that format cannot say exactly what this tokenizer does.
        """
        raise UserError(f"the tokenizer kind {self.kind!r} has no Hugging Face form; export one of another kind")

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def piece_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for inside a text: with the space that a first token may lose in `decode`."""
        return self.decode_bytes([token])

    def token_bytes(self) -> list[int]:
        """Number of UTF-8 bytes each id stands for, 0 for special tokens: nats per token become bits per byte."""
        return [len(self.piece_bytes(i)) for i in range(self.vocab_size)]

    def encode_with_special(self, text: str) -> list[int]:
        """Ids of `text`, in which the name of a special token is that token (of several that fit, the longest)."""
        return [i for part in self._cut(text) for i in self._ids_of(part)]

    def encode_spans(self, text: str) -> list[Span]:
        """`encode_with_special` with the place of each token in `text.encode()`."""
        spans: list[Span] = []
        end = 0
        for part in self._cut(text):
            for i in self._ids_of(part):
                start, end = end, end + (len(part.encode()) if part in self.special else len(self.piece_bytes(i)))
                spans.append((i, start, end))
        return spans

    def _cut(self, text: str) -> list[str]:
        """`text` in parts: the names of special tokens, and what is between them."""
        return [part for part in self._special_names.split(text) if part] if self.special else [text]

    def _ids_of(self, part: str) -> list[int]:
        return [self.special[part]] if part in self.special else self.encode(part)

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, sorted(self.special, key=len, reverse=True)))})")

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The conversation as text; see `sky_core.tokenizer.chat.render_chat`."""
        from sky_core.tokenizer.chat import render_chat

        return render_chat(self, messages, **options)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The conversation as ids; see `sky_core.tokenizer.chat.encode_chat`."""
        from sky_core.tokenizer.chat import encode_chat

        return encode_chat(self, messages, **options)

    @property
    def end_of_text(self) -> int | None:
        """Id of the token between documents, None when the tokenizer has none."""
        return None if self.end_of_text_name is None else self.special.get(self.end_of_text_name)

    @property
    def bos(self) -> int | None:
        """Id of the token that begins a text, None when the tokenizer has none. `encode` does not add it."""
        return None

    @property
    def prompt_prefix(self) -> tuple[int, ...]:
        """Ids that belong in front of a prompt, because the models made with this tokenizer saw every text so.

        `encode` gives the ids of the text alone; a rendered chat template writes the token itself.
        """
        return ()

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when any id or its meaning changes."""
        return fingerprint_of(self.as_dict())


class PieceTokenizer(Tokenizer):
    """A tokenizer whose every id stands for the same bytes wherever it occurs; special tokens stand for none."""

    def __init__(self, pieces: Sequence[bytes], special: dict[str, int]) -> None:
        self.pieces = list(pieces)
        self.special = special

    def _special_as_dict(self) -> dict[str, Any]:
        """What `as_dict` says of the special tokens; the further ones only where there are any."""
        further = [name for name in self.special if name != END_OF_TEXT]
        return {"end_of_text": END_OF_TEXT in self.special, **({"special": further} if further else {})}

    @classmethod
    @abstractmethod
    def from_dict(cls, definition: dict[str, Any]) -> Self:
        """The tokenizer whose `as_dict()` is `definition`."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        tokenizer = cls.from_dict(read_tokenizer(folder))
        tokenizer.chat_template = read_chat_template(folder)
        return tokenizer

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[dict[str, Any]], dict[str, Any]]:
        return type(self).from_dict, (self.as_dict(),), {"chat_template": self.chat_template}

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        numbers = list(map(operator.index, ids))
        outside = next((i for i in numbers if not 0 <= i < len(self.pieces)), None)
        if outside is not None:
            raise UserError(f"token id {outside} is none of this tokenizer's 0..{len(self.pieces) - 1}")
        return b"".join([self.pieces[i] for i in numbers])


class StreamDecoder:
    """Text of ids that arrive one by one: a character is given out once its last byte is there.

    The parts joined are `tokenizer.decode` of all ids; where an imported tokenizer writes a space in front of every
    text, the stream keeps the space that a continuation begins with.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes, possibly none."""
        return self._utf8.decode(self._tokenizer.piece_bytes(token))

    def finish(self) -> str:
        """U+FFFD for a character that never became complete, else nothing; the decoder starts afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def with_special(
    pieces: Sequence[bytes], end_of_text: bool, further: Sequence[str] = ()
) -> tuple[list[bytes], dict[str, int]]:
    """`pieces` followed by the special tokens, the end of text (if any) before the `further` ones, and their ids.

    Raises `UserError` for a name that is empty or there already.
    """
    names = [*([END_OF_TEXT] if end_of_text else []), *further]
    if "" in names:
        raise UserError("special: a special token without a name; give each a name such as <|user|>")
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UserError(f"special: {twice!r} is there twice; give each special token once")
    special = {name: len(pieces) + i for i, name in enumerate(names)}
    return [*pieces, *[b""] * len(special)], special


def utf8(text: str) -> bytes:
    """The bytes of `text`. Raises `UserError` for a lone surrogate, which Python allows and Unicode does not."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of the text is U+{ord(text[error.start]):04X}, a lone surrogate: "
            "no Unicode text; read the file as UTF-8 with errors='replace'"
        ) from None


def corpus(texts: Iterable[str]) -> Iterator[str]:
    """The documents of a corpus, one after the other. Raises `DataError` for one that is no Unicode, or for no text."""
    empty = True
    for number, text in enumerate(texts):
        try:
            empty = not utf8(text) and empty
        except UserError as error:
            raise DataError(f"document {number} of the corpus: {error}") from None
        yield text
    if empty:
        raise DataError("the corpus to train the tokenizer on holds no text; give files with at least one character")
