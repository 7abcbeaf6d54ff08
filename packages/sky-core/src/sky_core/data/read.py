"""Documents from files: text, source code, JSON lines, tar shards of documents, compressed or not, and Python's own.

    notes/              every file below with a known ending, in sorted order; names that begin with a dot are left out
    book.txt log.xyz    a file named directly is text whatever its ending (unless that says .jsonl or .tar)
    web.jsonl.zst       one JSON object a line: "text", and if present "id", "source", "domain"
    docs-000.tar        members NAME.txt with NAME.json beside them (webdataset's convention)
    python:             the documentation and the standard library of the Python that runs this

Everything is read as a stream. Text longer than `LONGEST` characters becomes several documents, cut after a line.
A compressed file is read as the file it holds; byte offsets in messages then count uncompressed bytes.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import json
import os
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sky_core.component import closest
from sky_core.data.compressed import COMPRESSED, damage, open_binary
from sky_core.errors import DataError

PYTHON = "python:"
"""The corpus that every Python installation holds."""

_ENDINGS = """
    .txt .md .rst .tex .html .css .xml .yaml .yml .toml .ini .cfg
    .py .pyi .c .h .cc .cpp .hpp .cu .cuh .java .js .ts .tsx .jsx .go .rs .rb .php .cs .swift .kt .scala
    .lua .pl .r .jl .hs .ml .ex .erl .clj .sh .sql
"""
TEXT = frozenset(_ENDINGS.split())
"""Endings that are read as text, one document a file."""

KNOWN = TEXT | {".jsonl", ".tar"}
"""Endings of the files that are looked for in a folder, with or without one of `COMPRESSED` behind."""

LONGEST = 1 << 25
"""Characters of the longest document; a longer file is cut."""

_CHUNK = 1 << 20
_FIELDS = ("id", "text", "source", "domain")
_STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}
)
"""Folders of the library that hold tests, other people's packages, the topics read apart, and tables of characters."""


@dataclass(frozen=True)
class Document:
    """A text. `id` names it within the corpus and stays the same when the corpus grows; `source` says where it lies."""

    id: str
    text: str
    source: str
    domain: str = ""


class Corpus:
    """The documents below `paths` (files, folders, `python:`); iterate as often as you like, the order is fixed.

    Documents without a visible character are skipped; `skipped` counts them in the latest pass. Raises `DataError`
    for a path that cannot be read, at once, and while iterating for content that is not text.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.paths = [str(path) for path in paths]
        self.files = [found for path in self.paths for found in _find(path)]
        self.skipped = 0

    def __iter__(self) -> Iterator[Document]:
        self.skipped = 0
        found = False
        for name, path in self.files:
            for document in _read(name, path):
                if document.text and not document.text.isspace():
                    found = True
                    yield document
                else:
                    self.skipped += 1
        if not found:
            empty = f"{self.skipped} empty documents" if self.skipped else "no documents"
            raise DataError(f"the corpus is empty: {empty} in {', '.join(self.paths) or 'no path'}")

    def digest(self) -> str:
        """Hexadecimal SHA-256 over names and raw content: the same corpus has the same digest wherever it lies."""
        total = hashlib.sha256()
        for name, path in self.files:
            with _explained(path), path.open("rb") as file:
                total.update(json.dumps([name, hashlib.file_digest(file, "sha256").hexdigest()]).encode())
        return total.hexdigest()


def read_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """The documents below `paths` once; see `Corpus`."""
    return iter(Corpus(paths))


def _find(path: str) -> list[tuple[str, Path]]:
    """(name, file) of every file that `path` means. Names do not depend on where the corpus lies."""
    if path == PYTHON:
        return _find_python()
    place = Path(path)
    with _explained(place):
        if place.is_dir():
            names = sorted(_walk(place))
            if not names:
                raise DataError(
                    f"{path}: the corpus is empty: no file below it ends in one of {' '.join(sorted(KNOWN))}"
                )
            return [(name, place / name) for name in names]
        if not place.exists():
            siblings = [item.name for item in place.parent.iterdir()] if place.parent.is_dir() else []
            raise DataError(f"{path}: no such file or folder{closest(place.name, siblings)}")
        return [(place.name, place)]


def _walk(folder: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error

    for where, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(where, name)
            if not name.startswith(".") and _ending(path) in KNOWN and path.is_file():
                yield path.relative_to(folder).as_posix()


def _ending(path: Path) -> str:
    """The ending that says what the content is: that of `a.jsonl.gz` is .jsonl."""
    return (Path(path.stem) if path.suffix in COMPRESSED else path).suffix.lower()


def _find_python() -> list[tuple[str, Path]]:
    topics = importlib.util.find_spec("pydoc_data.topics")
    if topics is None or topics.origin is None:
        raise DataError("python: this Python comes without its documentation (the module pydoc_data.topics)")
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(
        path for path in library.rglob("*.py") if not _STDLIB_LEFT_OUT & set(path.relative_to(library).parts)
    )
    return [("topics", Path(topics.origin)), *((path.relative_to(library).as_posix(), path) for path in modules)]


def _read(name: str, path: Path) -> Iterator[Document]:
    if name == "topics":
        from pydoc_data.topics import topics

        for topic, text in sorted(topics.items()):
            yield Document(f"topics/{topic}", text, f"{PYTHON}topics/{topic}", "documentation")
        return
    with _explained(path), open_binary(path) as file:
        ending = _ending(path)
        if ending == ".jsonl":
            yield from _read_json_lines(name, path, file)
        elif ending == ".tar":
            yield from _read_tar(name, path, file)
        else:
            yield from _read_text(name, path, file)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what can go wrong with a file into one line that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: the file vanished while the corpus was read") from error
    except damage() as error:
        raise DataError(f"{path}: damaged or incomplete archive ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _read_text(name: str, path: Path, file: IO[bytes]) -> Iterator[Document]:
    part, held = 0, ""
    for piece in _decoded(path, iter(lambda: file.read(_CHUNK), b"")):
        held += piece
        while len(held) > LONGEST:
            cut = held.rfind("\n", 0, LONGEST) + 1 or LONGEST
            part += 1
            yield Document(f"{name}:part{part}", held[:cut], f"{path}:part{part}")
            held = held[cut:]
    suffix = f":part{part + 1}" if part else ""
    yield Document(f"{name}{suffix}", held, f"{path}{suffix}")


def _decoded(path: Path | str, chunks: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 as text, without a byte order mark. Raises `DataError` with the byte offset of what is no text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for chunk in chunks:
        if 0 in chunk:
            raise DataError(
                f"{path}: a binary file (NUL byte at offset {offset + chunk.index(0)}); only text can be read"
            )
        yield _decode(path, decoder, chunk, offset).removeprefix("\ufeff" if offset == 0 else "")
        offset += len(chunk)
    _decode(path, decoder, b"", offset, final=True)


def _decode(
    path: Path | str, decoder: codecs.IncrementalDecoder, chunk: bytes, offset: int, final: bool = False
) -> str:
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: invalid UTF-8 at byte offset {offset - waiting + error.start}; convert it first"
        ) from error


def _read_json_lines(name: str, path: Path, file: IO[bytes]) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        where = f"{path}:{number}"
        if 0 in line:
            raise DataError(
                f"{where}: a binary file (NUL byte at offset {line.index(0)} of the line); only text can be read"
            )
        if line.strip():
            yield _document(_json_object(where, line), f"{name}:{number}", where)


def _json_object(where: str, content: bytes) -> dict[str, Any]:
    try:
        row = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: invalid UTF-8 at byte offset {error.start} of it; convert it first") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is needed, it is {row!r:.40}")
    return row


def _document(row: dict[str, Any], name: str, where: str) -> Document:
    if "text" not in row:
        raise DataError(f"{where}: no key 'text' (it has {', '.join(map(repr, row)) or 'none'}){closest('text', row)}")
    values = {"id": name, "source": where, "domain": ""} | {
        key: row[key] for key in _FIELDS if row.get(key) is not None
    }
    for key in ("text", "source", "domain"):
        if not isinstance(values[key], str):
            raise DataError(f"{where}: {key!r} must be a string, it is {values[key]!r:.40}")
    try:
        values["text"].encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: 'text' holds half a surrogate pair at character {error.start}") from error
    return Document(str(values["id"]), values["text"], values["source"], values["domain"])


def _read_tar(name: str, path: Path, file: IO[bytes]) -> Iterator[Document]:
    """Each NAME.txt is a document; a NAME.json before or after it tells its id, source and domain."""
    row: dict[str, Any] = {}
    stem = None
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is None:
                continue
            where, (this_stem, _, ending) = f"{path}:{member.name}", member.name.rpartition(".")
            if this_stem != stem:
                if "text" in row:
                    yield _document(row, f"{name}:{stem}", f"{path}:{stem}")
                row, stem = {}, this_stem
            if ending == "txt":
                row["text"] = "".join(_decoded(where, [content.read()]))
            elif ending == "json":
                row |= _json_object(where, content.read())
    if "text" in row:
        yield _document(row, f"{name}:{stem}", f"{path}:{stem}")
