"""Importing torch without looking for garbage: it makes half a million objects, and all of them stay."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """What is imported inside is left alone by Python's collector: it doesn't run meanwhile, nor walk over it later.

    Without this it takes a fifth of the time to the first step of a small run. A process that has torch already, as a
    notebook, is left as it is: not everything in it is to stay.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
