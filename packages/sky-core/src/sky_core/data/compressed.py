"""Files that may be compressed: .gz, .xz and .zst read as what they hold."""

from __future__ import annotations

import gzip
import io
import lzma
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from sky_core.errors import DataError

COMPRESSED = frozenset({".gz", ".xz", ".zst"})

_CHUNK = 1 << 20


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressing by its ending. Raises `OSError`, while reading also one of `damage()`."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        try:
            from zstandard import ZstdDecompressor
        except ImportError as error:
            raise DataError(f"{path}: reading .zst needs zstandard: pip install 'sky-core[zstd]'") from error
        return io.BufferedReader(_ZstdFile(path, ZstdDecompressor().decompressobj), _CHUNK)
    return path.open("rb")


def damage() -> tuple[type[Exception], ...]:
    """What reading a damaged or incomplete archive raises, apart from `OSError`."""
    zstandard = sys.modules.get("zstandard")
    zstd = () if zstandard is None else (zstandard.ZstdError,)
    return (EOFError, lzma.LZMAError, zlib.error, tarfile.ReadError, *zstd)


class _ZstdFile(io.RawIOBase):
    """The content of a .zst file. Unlike zstandard's own reader it notices when the file was cut short."""

    def __init__(self, path: Path, new_frame: Callable[[], Any]) -> None:
        self._new_frame = new_frame
        self._frame = self._new_frame()
        self._file = path.open("rb")
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._frame.unused_data or self._file.read(_CHUNK)
            if not chunk and not self._frame.eof:
                raise EOFError("it ends in the middle of a frame")
            if not chunk:
                return 0
            if self._frame.eof:
                self._frame = self._new_frame()
            self._ready = memoryview(self._frame.decompress(chunk))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
