"""Batches made ahead of time by one thread, so that training never waits for reading.

Reading is random access, so this is a queue of futures and one integer; nothing to save, nothing to fast-forward.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from sky_core.data.dataset import Batch, Dataset


class Loader:
    """Endless batches of `count` sequences: from sequence `start` on, then `stride` later (default `count`), and so on.

    `position` is the start of the batch that comes next: a loader made with `start=position` goes on exactly there.
    Rank r of W reads its share of every global batch with `start + r * count` and `stride = W * count`. `pinned`
    batches lie in page-locked memory, from where a GPU fetches them while it computes. `waited` is how many seconds
    were spent on waiting for batches so far. An exception in the dataset is raised where its batch would have come.
    Close it, or use it as a context manager.
    """

    def __init__(
        self,
        dataset: Dataset,
        start: int,
        count: int,
        *,
        stride: int | None = None,
        ahead: int = 2,
        pinned: bool = False,
    ) -> None:
        self.position = start
        self.waited = 0.0
        self._dataset, self._count, self._pinned = dataset, count, pinned
        self._stride = count if stride is None else stride
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: deque[Future[Batch]] = deque(self._read(start + i * self._stride) for i in range(ahead))

    def _read(self, start: int) -> Future[Batch]:
        return self._thread.submit(self._make, start)

    def _make(self, start: int) -> Batch:
        batch = self._dataset.batch(start, self._count)
        return batch.pinned() if self._pinned else batch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        self._coming.append(self._read(self.position + len(self._coming) * self._stride))
        asked = time.perf_counter()
        batch = self._coming.popleft().result()
        self.waited += time.perf_counter() - asked
        self.position += self._stride
        return batch

    def close(self) -> None:
        """Stop reading; waits for the batch in the making."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
