"""A folder that appears whole or not at all, and is written by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sky_core.errors import DataError, SkyError
from sky_core.files import sync_file, sync_folder


@contextmanager
def new_folder(out: Path, marker: str, *, force: bool) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends well and vanishes when it does not.

    What a killed process left behind is cleared by the next. `out` may exist when it is empty; with `force` also
    when it holds the file `marker`, and is then replaced at the end. Raises `DataError` when it exists otherwise, and
    `SkyError` when the disk fails.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: a file stands there; give a folder that does not exist yet")
    if out.exists() and any(out.iterdir()):
        if not (out / marker).exists():
            raise DataError(f"{out}: a folder with other things in it; give one that does not exist yet")
        if not force:
            raise DataError(f"{out}: prepared already; give another folder, or --force to replace it")
    partial, replaced = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.replaced")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            sync_folder(path) if path.is_dir() else sync_file(path)
        sync_folder(partial)
        if out.exists() and any(out.iterdir()):
            shutil.rmtree(replaced, ignore_errors=True)
            out.rename(replaced)
        partial.rename(out)
        sync_folder(out.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise SkyError(f"{out}: cannot be written: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(out: Path, *, wait: bool) -> Iterator[None]:
    """Keep other processes from writing `out` meanwhile. The lock dies with the process that holds it.

    Another holder is waited for, or, without `wait`, a `DataError`.
    """
    out = Path(os.path.abspath(out))
    path = out.with_name(f".{out.name}.lock")
    out.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            raise DataError(f"{out}: another process is writing it right now") from None
        # The holder before us has removed the name it had locked: what we hold may be a file nobody else will find.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink()
        os.close(descriptor)
