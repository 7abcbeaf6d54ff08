"""What a prepared folder holds: meta.json, the tokenizer, and per split a stream of tokens with its document ends.

    meta.json         the schema below; written last
    tokenizer/        the tokenizer as it saves itself
    train.bin         every token of the split, little-endian uint16 or uint32: document after document
    train.idx         little-endian uint64: where each document ends (one past its last token)
    validation.bin, validation.idx

A folder of shards (`format: shards`, see `sky_core.data.shards`) has train-00000.tar, ... in place of train.bin, and
train.members that says where in them each run of tokens lies.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import ValidationError

from sky_core.component import Schema
from sky_core.errors import DataError
from sky_core.files import sha256

if TYPE_CHECKING:
    from sky_core.tokenizer.base import Tokenizer

META = "meta.json"
VERSION = 1
AGAIN = "prepare the data again (sky data prepare ... --force)"

Format = Literal["tokens", "shards"]


class File(Schema):
    """A file of the folder; `size` in bytes."""

    name: str
    size: int
    sha256: str


class Split(Schema):
    """One split. `bytes` counts the UTF-8 bytes of its text; end-of-text tokens count as tokens."""

    tokens: int
    documents: int
    bytes: int
    files: list[File]
    """The tokens: one .bin, or the .tar shards in order."""
    index: File
    members: File | None = None


class TokenizerRecord(Schema):
    """Which tokenizer made the tokens. `options`: the run-file form it was trained from, if it was trained here."""

    kind: str
    fingerprint: str
    vocab_size: int
    end_of_text: int | None
    options: dict[str, Any] | None

    def require(self, tokenizer: Tokenizer, folder: Path) -> None:
        """Raise `DataError` when `tokenizer`, found in the prepared `folder`, is not the one that made the tokens."""
        if tokenizer.fingerprint != self.fingerprint:
            raise DataError(
                f"{folder / 'tokenizer'}: fingerprint {tokenizer.fingerprint}, but the tokens were made by "
                f"{self.fingerprint}; {AGAIN}"
            )


class Stored(Schema):
    """A folder of files that can be verified, described by its meta.json."""

    version: int = VERSION

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The meta.json of a folder of this sort. Raises `DataError` when there is none or it cannot be understood."""
        stored = read_stored(folder)
        if not isinstance(stored, cls):
            raise DataError(f"{folder}: holds {stored.format}, which do not fit here; see: sky data show {folder}")
        return stored

    def all_files(self) -> list[File]:
        """Every file that holds data."""
        raise NotImplementedError

    def verify(self, folder: Path, *, content: bool) -> None:
        """Compare every file's size, and with `content` its SHA-256, with what was written. Raises `DataError`."""
        for file in self.all_files():
            path = folder / file.name
            if not path.is_file():
                raise DataError(f"{path}: missing; {AGAIN}")
            size = path.stat().st_size
            if size != file.size:
                state = "truncated" if size < file.size else "too long"
                raise DataError(f"{path}: {state}: {size:,} bytes, {file.size:,} were written; {AGAIN}")
        for file in self.all_files() if content else ():
            found = sha256(folder / file.name)
            if found != file.sha256:
                raise DataError(
                    f"{folder / file.name}: damaged: its SHA-256 begins {found[:16]}, "
                    f"that of what was written {file.sha256[:16]}; {AGAIN}"
                )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the content of every file."""
        return hashlib.sha256("".join(file.sha256 for file in self.all_files()).encode()).hexdigest()[:16]

    def as_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


class Meta(Stored):
    """Prepared tokens. `skipped` counts documents without text; `split` says how documents were divided."""

    format: Format
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerRecord
    split: dict[str, str | float]
    skipped: int
    splits: dict[str, Split]

    def all_files(self) -> list[File]:
        return [
            file
            for split in self.splits.values()
            for file in (*split.files, split.index, *([split.members] if split.members else []))
        ]


class DocumentsMeta(Stored):
    """Text shards (`sky_core.data.shards`): documents that are yet to be tokenized."""

    format: Literal["documents"] = "documents"
    documents: int
    files: list[File]
    index: File

    def all_files(self) -> list[File]:
        return [*self.files, self.index]


def read_stored(folder: Path) -> Meta | DocumentsMeta:
    """What a folder holds, by its meta.json. Raises `DataError` when there is none or it cannot be understood."""
    path = folder / META
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; make it with: sky data prepare TEXTS --out {folder}")
    if not path.is_file():
        raise DataError(f"{folder}: not prepared (no {META}); make it with: sky data prepare TEXTS --out NEW_FOLDER")
    try:
        content = path.read_bytes()
        found = json.loads(content)
        version = found["version"]
        if isinstance(version, int) and version > VERSION:
            raise DataError(f"{path}: format {version}, this sky-core reads up to {VERSION}; upgrade sky-core")
        return (DocumentsMeta if found["format"] == "documents" else Meta).model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: damaged ({where}: {first['msg']}); {AGAIN}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged (not the JSON it should be); {AGAIN}") from error


class HashedFile:
    """A new file that knows its size and SHA-256 when it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> File:
        size = self._file.tell()
        self._file.close()
        return File(name=self._path.name, size=size, sha256=self._hash.hexdigest())


class FlatWriter:
    """Writes a split's tokens into one file."""

    def __init__(self, folder: Path, split: str) -> None:
        self._file = HashedFile(folder / f"{split}.bin")

    def write(self, tokens_N: np.ndarray) -> None:
        self._file.write(tokens_N.data)

    def close(self) -> dict[str, Any]:
        """The fields of `Split` that say where the tokens are."""
        return {"files": [self._file.close()]}


class FlatTokens:
    """A split's tokens in one memory-mapped file."""

    def __init__(self, folder: Path, split: Split, dtype: str) -> None:
        self._tokens_N = map_file(folder / split.files[0].name, dtype)

    def __len__(self) -> int:
        return len(self._tokens_N)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens start .. stop - 1."""
        return self._tokens_N[start:stop]

    def gather(self, starts_B: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens from each start, (B, length); after the last token of the split comes the first."""
        if starts_B.max(initial=0) + length > len(self):
            return self._tokens_N[(starts_B[:, None] + np.arange(length)) % len(self)]
        step = self._tokens_N.itemsize
        shape = len(self) - length + 1, length
        # Every window there is, overlapping, as a view: taking rows of it copies runs, not token by token.
        return np.ndarray(shape, self._tokens_N.dtype, self._tokens_N, strides=(step, step))[starts_B]


def map_file(path: Path, dtype: str, *, offset: int = 0, count: int | None = None) -> np.ndarray:
    """`count` little-endian numbers of a file from byte `offset` on (all that follow by default), memory-mapped."""
    if count is None:
        count = (path.stat().st_size - offset) // np.dtype(dtype).itemsize
    if not count:
        return np.empty(0, dtype)
    # As a plain array: indexing a memmap makes a memmap again, which costs more than the few tokens it holds.
    return np.asarray(np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r", offset, (count,)))
