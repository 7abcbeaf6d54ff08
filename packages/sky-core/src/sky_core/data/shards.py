"""Webdataset tar shards (Aizman et al. 2019, arXiv:2001.01858) that are also random access.

Two stages, both readable by the `webdataset` library:

    documents   documents-00000.tar: 0000000000.txt and .json (id, source, domain) per document
    tokens      train-00000.tar: 0000000000.bin, each a run of `MEMBER` tokens, raw little-endian

The cost of a tar is per member: a 512-byte header, and a Python object for whoever streams it. One sequence a member
reads ten times slower than one large file; with 128 thousand tokens a member and sequences cut inside of it the
difference is gone. Documents therefore run on across members and shards, as they do in one .bin.

A stream of tar members cannot resume at an arbitrary position. An uncompressed tar can: beside the shards lies an
index of uint64 rows that says where each member's data starts, and we map the tar and read at that offset. (Data in a
tar starts at a multiple of 512 bytes, so the numbers in it are aligned.)
"""

from __future__ import annotations

import json
import tarfile
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sky_core.data.folder import locked, new_folder
from sky_core.data.prepared import META, DocumentsMeta, File, HashedFile, Split, map_file
from sky_core.data.read import Document
from sky_core.files import write_atomic

MEMBER = 1 << 17
"""Tokens per member of a token shard."""

SHARD = 1 << 27
"""Bytes after which a new tar is begun."""


class TarShards:
    """Writes `stem-00000.tar`, `stem-00001.tar`, ...; the same members give the same bytes, whenever and wherever."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem
        self._file: HashedFile | None = None
        self.files: list[File] = []

    def add(self, name: str, data: bytes) -> tuple[int, int]:
        """Append a member; returns (shard, byte offset of its data)."""
        if self._file is None:
            self._file = HashedFile(self._folder / f"{self._stem}-{len(self.files):05d}.tar")
        header = tarfile.TarInfo(name)
        header.size = len(data)
        self._file.write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._file.tell()
        self._file.write(data)
        self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return len(self.files), offset

    def end_sample(self) -> None:
        """The members up to here belong together; begin a new shard if this one is full."""
        if self._file is not None and self._file.tell() >= SHARD:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            end = self._file.tell() + 2 * tarfile.BLOCKSIZE
            self._file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
            self.files.append(self._file.close())
            self._file = None


class ShardWriter:
    """Writes a split's tokens into shards. Same interface as `sky_core.data.prepared.FlatWriter`."""

    def __init__(self, folder: Path, split: str) -> None:
        self._shards = TarShards(folder, split)
        self._index = HashedFile(folder / f"{split}.members")
        self._held: list[np.ndarray] = []
        self._n_held = self._members = 0

    def write(self, tokens_N: np.ndarray) -> None:
        self._held.append(tokens_N)
        self._n_held += len(tokens_N)
        if self._n_held >= MEMBER:
            held_N = np.concatenate(self._held)
            whole = len(held_N) // MEMBER * MEMBER
            for start in range(0, whole, MEMBER):
                self._add(held_N[start : start + MEMBER])
            self._held, self._n_held = [held_N[whole:]], len(held_N) - whole

    def _add(self, tokens_N: np.ndarray) -> None:
        shard, offset = self._shards.add(f"{self._members:010d}.bin", tokens_N.tobytes())
        self._shards.end_sample()
        self._index.write(np.array([shard, offset, self._members * MEMBER], "<u8").tobytes())
        self._members += 1

    def close(self) -> dict[str, Any]:
        """The fields of `Split` that say where the tokens are."""
        if self._n_held:
            self._add(np.concatenate(self._held))
        self._shards.close()
        return {"files": self._shards.files, "members": self._index.close()}


class ShardTokens:
    """A split's tokens in tar shards, by offset. Same interface as `sky_core.data.prepared.FlatTokens`."""

    def __init__(self, folder: Path, split: Split, dtype: str) -> None:
        assert split.members is not None, "a split of shards has an index of members"
        members_M3 = map_file(folder / split.members.name, "uint64").reshape(-1, 3).astype(np.int64)
        self._n = split.tokens
        self._dtype = np.dtype(dtype)
        self._shard_M = members_M3[:, 0].tolist()
        self._end_M = [*members_M3[1:, 2].tolist(), self._n]
        # From a token's number in the split to its place in the map of its shard.
        self._shift_M = (members_M3[:, 1] // self._dtype.itemsize - members_M3[:, 2]).tolist()
        self._maps = [map_file(folder / file.name, dtype) for file in split.files]

    def __len__(self) -> int:
        return self._n

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens start .. stop - 1."""
        parts = []
        while start < stop:
            member = bisect_right(self._end_M, start)
            shift, end = self._shift_M[member], min(stop, self._end_M[member])
            parts.append(self._maps[self._shard_M[member]][start + shift : end + shift])
            start = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def gather(self, starts_B: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens from each start, (B, length); after the last token of the split comes the first."""
        out_BL = np.empty((len(starts_B), length), self._dtype)
        for out_L, start in zip(out_BL, starts_B.tolist(), strict=True):
            done = 0
            while done < length:
                count = min(length - done, self._n - start)
                out_L[done : done + count] = self.read(start, start + count)
                done, start = done + count, 0
        return out_BL


def write_document_shards(documents: Iterable[Document], out: Path, *, force: bool = False) -> DocumentsMeta:
    """Write documents as text shards in a new folder and return its meta. Raises as reading and `new_folder` do."""
    with locked(out, wait=False), new_folder(out, META, force=force) as folder:
        shards, index, count = TarShards(folder, "documents"), HashedFile(folder / "documents.members"), 0
        for document in documents:
            row = {"id": document.id, "source": document.source, "domain": document.domain}
            text, facts = document.text.encode(), json.dumps(row, ensure_ascii=False).encode()
            shard, text_offset = shards.add(f"{count:010d}.txt", text)
            _, facts_offset = shards.add(f"{count:010d}.json", facts)
            shards.end_sample()
            index.write(np.array([shard, text_offset, len(text), facts_offset, len(facts)], "<u8").tobytes())
            count += 1
        shards.close()
        meta = DocumentsMeta(documents=count, files=shards.files, index=index.close())
        write_atomic(folder / META, meta.as_json())
    return meta


class DocumentShards:
    """Random access to the documents that `write_document_shards` wrote: `len(shards)`, `shards[i]`."""

    def __init__(self, folder: Path) -> None:
        meta = DocumentsMeta.read(folder)
        meta.verify(folder, content=False)
        self._paths = [folder / file.name for file in meta.files]
        self._index_N5 = map_file(folder / meta.index.name, "uint64").reshape(-1, 5)

    def __len__(self) -> int:
        return len(self._index_N5)

    def __getitem__(self, i: int) -> Document:
        shard, text_at, text_size, facts_at, facts_size = self._index_N5[i].tolist()
        with self._paths[shard].open("rb") as file:
            file.seek(text_at)
            text = file.read(text_size).decode()
            file.seek(facts_at)
            return Document(text=text, **json.loads(file.read(facts_size)))
