"""What the log leaves out where a command only looks at a model: everything that training said of it before."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(name: str = "sky_core.model") -> Iterator[None]:
    """Inside, the loggers below `name` say warnings only; with --debug they say everything."""
    logger = logging.getLogger(name)
    level = logger.level
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
