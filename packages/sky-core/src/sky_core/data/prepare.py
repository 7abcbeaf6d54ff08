"""Documents to token files: split, train a tokenizer if none is given, tokenize in parallel, write in one step.

Everything streams: memory holds a few megabytes of text per worker however large the corpus is, and the bytes written
are the same whatever the number of workers. The folder appears when it is complete (`sky_core.data.folder`).

Splits:

    document   a document belongs to validation when a keyed hash of its id falls below the fraction. Adding documents
               moves none of the others, and a larger fraction keeps those that were in.
    position   the texts are joined; the first characters train and the last `validation` of them validate, as in
               nanoGPT's data/*/prepare.py. The document at the border is cut.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sky_core import slots
from sky_core.data.folder import locked, new_folder
from sky_core.data.prepared import META, FlatWriter, Format, HashedFile, Meta, Split, TokenizerRecord
from sky_core.data.read import Document
from sky_core.data.shards import ShardWriter
from sky_core.errors import DataError, SkyError, UserError
from sky_core.files import write_atomic
from sky_core.tokenizer.base import Tokenizer

SplitBy = Literal["document", "position"]
Progress = Callable[[str, int, int], None]
"""Called with what is going on, and the number of documents and characters done."""

PIECE = 1 << 20
"""Characters tokenized at once; longer documents are cut at line ends."""

_WRITERS: dict[str, type[FlatWriter | ShardWriter]] = {"tokens": FlatWriter, "shards": ShardWriter}


def prepare(
    documents: Iterable[Document],
    out: Path,
    tokenizer: Tokenizer | slots.Tokenizer,
    *,
    split: SplitBy = "document",
    validation: float = 0.1,
    format: Format = "tokens",
    workers: int = 1,
    force: bool = False,
    reuse: bool = False,
    progress: Progress | None = None,
) -> Meta:
    """Write `documents` as a prepared folder (`sky_core.data.prepared`) and return its meta.

    `documents` is iterated more than once: a `Corpus` or a list, not a generator. `tokenizer` is one that exists, or a
    component, which is trained on the training documents. `validation` is the fraction (0 to below 1) kept for the
    validation split; 0 makes none. `reuse` returns a folder that is there already, waiting for whoever is writing it;
    `force` replaces it. Raises `DataError` for a corpus that cannot be used, `SkyError` when the disk or a worker
    fails.
    """
    if iter(documents) is documents:
        raise TypeError("prepare reads the documents more than once: give a list or a Corpus, not a generator")
    if not 0 <= validation < 1:
        raise DataError(f"validation: a fraction of at least 0 and below 1 is needed, got {validation}")
    with locked(out, wait=reuse):
        if reuse and (out / META).exists():
            return Meta.read(out)
        with new_folder(out, META, force=force) as folder:
            splitter = _splitter(documents, split, validation, progress)
            options = None
            if isinstance(tokenizer, slots.Tokenizer):
                options = tokenizer.as_dict()
                texts = (
                    part.text for part in splitter(_counted(documents, "tokenizer", progress)) if part.split == "train"
                )
                tokenizer = tokenizer.train(texts)
            dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
            names = ["train", "validation"] if validation else ["train"]
            writers = {name: _SplitWriter(folder, name, _WRITERS[format]) for name in names}
            encode = _Encode(tokenizer, dtype)
            tasks = _tasks(splitter(_counted(documents, "tokens", progress)))
            for name, ids_N, size, ends in chain.from_iterable(_in_order(encode, tasks, workers)):
                writers[name].write(ids_N, size, ends)
            meta = Meta(
                format=format,
                dtype=dtype,
                tokenizer=TokenizerRecord(
                    kind=tokenizer.kind,
                    fingerprint=tokenizer.fingerprint,
                    vocab_size=tokenizer.vocab_size,
                    end_of_text=tokenizer.end_of_text,
                    options=options,
                ),
                split={"by": split, "validation": validation},
                skipped=getattr(documents, "skipped", 0),
                splits={name: writer.close() for name, writer in writers.items()},
            )
            _check_splits(meta, split, validation)
            (folder / "tokenizer").mkdir()
            tokenizer.save(folder / "tokenizer")
            write_atomic(folder / META, meta.as_json())
    return meta


def default_workers() -> int:
    """Tokenizing processes that are worth starting here."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


def in_validation(document_id: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a function of its id and the fraction alone."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, key=b"sky validation").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class _Part(NamedTuple):
    """A document, or a part of one. `begins`: it is the document's first; `ends`: the document ends here; `complete`:
    and its end is the true one."""

    split: str
    text: str
    source: str
    begins: bool = True
    ends: bool = True
    complete: bool = True


Splitter = Callable[[Iterable[Document]], Iterator[_Part]]


def _splitter(documents: Iterable[Document], split: SplitBy, validation: float, progress: Progress | None) -> Splitter:
    if split == "document":
        return partial(_by_document, fraction=validation)
    characters = sum(len(document.text) for document in _counted(documents, "length", progress))
    return partial(_by_position, border=int(characters * (1 - validation)), total=characters)


def _by_document(documents: Iterable[Document], fraction: float) -> Iterator[_Part]:
    for document in documents:
        split = "validation" if in_validation(document.id, fraction) else "train"
        yield _Part(split, document.text, document.source)


def _by_position(documents: Iterable[Document], border: int, total: int) -> Iterator[_Part]:
    left, seen = border, 0
    for document in documents:
        before, after = document.text[: max(left, 0)], document.text[max(left, 0) :]
        if before:
            yield _Part("train", before, document.source, complete=not after)
        if after:
            yield _Part("validation", after, document.source, begins=not before)
        left -= len(document.text)
        seen += len(document.text)
    if seen != total:
        raise DataError(
            f"the corpus changed while it was read: {total:,} characters at first, then {seen:,}; try again"
        )


def _counted(documents: Iterable[Document], stage: str, progress: Progress | None) -> Iterator[Document]:
    characters = 0
    for count, document in enumerate(documents, start=1):
        yield document
        characters += len(document.text)
        if progress is not None:
            progress(stage, count, characters)


def _pieces(part: _Part) -> Iterator[_Part]:
    """`part` in texts of at most PIECE characters, cut after a line where one word ends and the next begins.

    There a pre-tokenizer's pattern cuts as well, so the tokens are those of the whole text.
    """
    text = part.text
    while len(text) > PIECE:
        cut = text.rfind("\n", 1, PIECE)
        while cut > 0 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
            cut = text.rfind("\n", 1, cut)
        cut = cut + 1 if cut > 0 else PIECE
        yield part._replace(text=text[:cut], ends=False, complete=False)
        part, text = part._replace(begins=False), text[cut:]
    yield part._replace(text=text)


def _tasks(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Pieces in batches of about PIECE characters: large enough to be worth sending to another process."""
    batch, size = [], 0
    for piece in chain.from_iterable(map(_pieces, parts)):
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


Encoded = list[tuple[str, np.ndarray, int, bool]]
"""(split, tokens, UTF-8 bytes, whether a document ends there) of each piece."""


@dataclass(frozen=True)
class _Encode:
    tokenizer: Tokenizer
    dtype: str

    def __call__(self, batch: list[_Part]) -> Encoded:
        encoded = []
        for part in batch:
            try:
                ids = self.tokenizer.encode(part.text)
            except UserError as error:
                raise DataError(f"{part.source}: {error}") from error
            if part.begins:
                ids = [*self.tokenizer.prompt_prefix, *ids]
            if part.complete and self.tokenizer.end_of_text is not None:
                ids = [*ids, self.tokenizer.end_of_text]
            encoded.append((part.split, np.array(ids, self.dtype), len(part.text.encode()), part.ends))
        return encoded


_encode: Callable[[list[_Part]], Encoded]


def _start_worker(encode: _Encode) -> None:
    """Receive the tokenizer once, and end when the parent does: a killed parent must not leave workers behind."""
    global _encode
    _encode = encode
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(batch: list[_Part]) -> Encoded:
    return _encode(batch)


def _in_order(encode: _Encode, tasks: Iterable[list[_Part]], workers: int) -> Iterator[Encoded]:
    """Results in the order of the tasks, with no more than a few tasks per worker under way."""
    if workers == 1:
        yield from map(encode, tasks)
        return
    # Spawned, not forked: the caller may hold threads (torch's among them), which a fork would leave half copied.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encode,)) as pool:
        under_way: deque[Future[Encoded]] = deque()
        try:
            for task in tasks:
                under_way.append(pool.submit(_work, task))
                if len(under_way) > 3 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise SkyError("a tokenizing process died (out of memory?); try again with fewer --workers") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _SplitWriter:
    """One split's tokens and document ends, counted."""

    def __init__(self, folder: Path, name: str, writer: type[FlatWriter | ShardWriter]) -> None:
        self._tokens = writer(folder, name)
        self._ends = HashedFile(folder / f"{name}.idx")
        self._n_tokens = self._n_documents = self._n_bytes = 0

    def write(self, ids_N: np.ndarray, size: int, ends: bool) -> None:
        self._tokens.write(ids_N.astype(ids_N.dtype.newbyteorder("<")))
        self._n_tokens += len(ids_N)
        self._n_bytes += size
        if ends:
            self._ends.write(np.array(self._n_tokens, "<u8").tobytes())
            self._n_documents += 1

    def close(self) -> Split:
        return Split(
            tokens=self._n_tokens,
            documents=self._n_documents,
            bytes=self._n_bytes,
            index=self._ends.close(),
            **self._tokens.close(),
        )


def _check_splits(meta: Meta, split: SplitBy, validation: float) -> None:
    documents = sum(part.documents for part in meta.splits.values())
    for name, part in meta.splits.items():
        if not part.tokens:
            by_position = "cut the text instead (--split position; in a run file, split: position)"
            advice = by_position if split == "document" else "give more text"
            raise DataError(
                f"the {name} split is empty: {documents} document{'s' * (documents != 1)}, of which a fraction of "
                f"{validation:g} is to validate; {advice}, or change the fraction (--validation; in a run "
                "file, validation:)"
            )
