"""Items of a task from the user's own JSON lines, each with the place to name when something is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sky_core.component import closest
from sky_core.data.compressed import damage, open_binary
from sky_core.errors import DataError

Item = TypeVar("Item")


class Record:
    """One line of a file: a JSON object. `fail` raises `DataError` with its place (file:line)."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where = where
        self.values = values

    def fail(self, problem: str) -> NoReturn:
        raise DataError(f"{self.where}: {problem}")

    def first(self, *keys: str) -> tuple[str, Any]:
        """The first of `keys` that the line has, and its value."""
        for key in keys:
            if key in self.values:
                return key, self.values[key]
        have = ", ".join(map(repr, self.values)) or "none"
        self.fail(f"no key {' or '.join(map(repr, keys))} (it has {have}){closest(keys[0], self.values)}")

    def text(self, *keys: str) -> str:
        """`first` of `keys`, a string."""
        key, value = self.first(*keys)
        if not isinstance(value, str):
            self.fail(f"{key!r} must be a string, it is {value!r:.40}")
        return value

    def optional_text(self, *keys: str) -> str:
        """`text`, or an empty string where the line has none of `keys`."""
        return self.text(*keys) if any(key in self.values for key in keys) else ""


def read_records(paths: str | Sequence[str]) -> Iterator[Record]:
    """The lines of JSON-lines files (.gz, .xz and .zst as well); blank lines are skipped.

    Raises `DataError` for a file that cannot be read, a line that is no JSON object, and files without a line.
    """
    paths = [paths] if isinstance(paths, str) else paths
    empty = True
    for path in map(Path, paths):
        try:
            with open_binary(path) as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        empty = False
                        yield Record(f"{path}:{number}", _object(f"{path}:{number}", line))
        except FileNotFoundError as error:
            siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{path}: no such file{closest(path.name, siblings)}") from error
        except damage() as error:
            raise DataError(f"{path}: damaged or incomplete archive ({error})") from error
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error
    if empty:
        raise DataError(f"{', '.join(paths)}: no items; give a file with one JSON object a line")


def _object(where: str, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: invalid UTF-8 at byte offset {error.start} of the line; convert it first") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: a JSON object is needed, it is {values!r:.40}")
    return values


def chosen(items: Sequence[Item], at_most: int | None, content: Callable[[Item], str]) -> list[Item]:
    """At most `at_most` of `items` (None: all), in their order: those whose `content` has the smallest hash.

    A choice by content, without a seed: it is the same on every machine and for every model, and adding items to the
    file replaces few of those chosen.
    """
    if at_most is None or len(items) <= at_most:
        return list(items)

    def rank(i: int) -> bytes:
        return hashlib.blake2b(content(items[i]).encode(errors="surrogatepass"), digest_size=8).digest()

    return [items[i] for i in sorted(sorted(range(len(items)), key=rank)[:at_most])]
