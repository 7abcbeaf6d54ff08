"""Writing so that a reader never sees half a file: temporary name, flush, rename."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sky_core.errors import SkyError


def cache_folder(name: str) -> Path:
    """The folder `name` in the user's cache, made if need be: what it holds can be made again."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sky" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step; a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def finite(data: Any) -> Any:
    """`data` with null for every number that is not finite: NaN and Infinity are no JSON."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def append_json_line(path: Path, data: Any) -> None:
    """Append one JSON line and flush it. A line torn by a crash stays a line of its own, which readers skip."""
    with path.open("ab+") as file:
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        line = json.dumps(finite(data), ensure_ascii=False, allow_nan=False)
        file.write(f"{TORN if torn else ''}{line}\n".encode())


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a JSON-lines file; nothing when there is no such file. Raises `SkyError` for damage."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n") or line.endswith(TORN):
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise SkyError(f"{path}:{number}: damaged line; delete it to go on") from error


TORN = " torn\n"
"""Ends a line that a crash cut off, written before the next one."""


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file that somebody else wrote durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def point_link(link: Path, target: str) -> None:
    """Point the symbolic link at `target` in one step."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
