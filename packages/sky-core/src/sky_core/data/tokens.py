"""Sequences from a prepared folder, memory-mapped and in random access: the dataset that models are trained on.

B batch (sequences), T time (tokens), N tokens of a split, D documents, L = T + 1; and in a batch: P pieces of
documents, F first tokens of documents, S spans of one document in one row.

`packing: stream`. The training split is read as a ring of N tokens, its first document following its last as any
document follows another. Epoch e cuts it into N // T windows of T inputs (and, one to the right, T targets) beginning
at a phase drawn from (seed, e), and reads the windows in an order drawn from (seed, e). So in every epoch every token
but the N % T that are left over is a target exactly once, no two epochs cut at the same places, and sequence i is a
function of (seed, i). nanoGPT draws windows with replacement instead: after "one epoch" 37 % were never seen.

`packing: best_fit`. Rows hold whole documents (`sky_core.data.packing`); no target leaves its document, and padding
carries no loss.

`documents: mask` numbers the documents of a row, so that attention stays inside of them (Zhao et al. 2024,
arXiv:2402.13991, "intra-document causal masking", as in Llama 3), and restarts positions with each. The first token of
a document then follows nothing: it is no target. (With `ignore` it is one, predicted from the document before: the
loss of GPT-2 and nanoGPT.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sky_core.data.dataset import IGNORE, Batch, Dataset
from sky_core.data.packing import best_fit, ranges
from sky_core.data.permute import Shuffle, draw
from sky_core.data.prepared import FlatTokens, Meta, map_file
from sky_core.data.shards import ShardTokens
from sky_core.errors import DataError
from sky_core.tokenizer.files import load_tokenizer

Documents = Literal["ignore", "mask"]
Packing = Literal["stream", "best_fit"]


class TokenFiles(Dataset):
    """A prepared folder (token files or shards) as sequences of `sequence_length` tokens.

    Opening compares sizes and, unless `verify` is False, the SHA-256 of every file. Raises `DataError` for a folder
    that is not prepared, damaged, or holds less than one sequence.
    """

    def __init__(
        self,
        folder: Path,
        sequence_length: int,
        *,
        seed: int = 0,
        documents: Documents = "ignore",
        packing: Packing = "stream",
        verify: bool = True,
    ) -> None:
        self.folder = folder
        self.sequence_length = sequence_length
        self.meta = Meta.read(folder)
        self.meta.verify(folder, content=verify)
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        self.meta.tokenizer.require(self.tokenizer, folder)
        self._mask = documents == "mask"
        self._options = [sequence_length, seed, documents, packing]
        self._splits = {name: _Split(folder, name, self.meta) for name in self.meta.splits}
        self._train = self._splits["train"]
        if len(self._train) <= sequence_length:
            raise DataError(
                f"{folder}: the training split holds {len(self._train):,} tokens, fewer than one sequence of "
                f"{sequence_length:,} and its last target; give more text or a smaller sequence_length"
            )
        self._plan = best_fit(self._train.ends_D, sequence_length) if packing == "best_fit" else None
        self._shuffle = Shuffle(len(self), seed)
        self._phase = lru_cache(maxsize=8)(lambda epoch: draw(len(self._train), seed, epoch))

    @property
    def fingerprint(self) -> str:
        facts = [self.meta.digest, self.meta.tokenizer.fingerprint, *self._options]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._plan) if self._plan else len(self._train) // self.sequence_length

    def batch(self, start: int, count: int) -> Batch:
        epochs_B, items_B = self._shuffle(start, count)
        if self._plan:
            return self._packed(items_B)
        phases_B = np.array([self._phase(epoch) for epoch in epochs_B.tolist()], dtype=np.int64)
        return self._windows(self._train, (phases_B + items_B * self.sequence_length) % len(self._train))

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """Windows side by side, whatever the packing: every token but the first (with `mask`: of a document) once."""
        split = self._splits.get("validation")
        if split is None:
            raise DataError(f"{self.folder}: prepared without a validation split; prepare it with --validation 0.1")
        starts = np.arange(0, len(split) - 1, self.sequence_length)
        for low in range(0, len(starts), batch_size):
            starts_B = starts[low : low + batch_size]
            batch = self._windows(split, starts_B)
            beyond_BT = starts_B[:, None] + np.arange(1, self.sequence_length + 1) >= len(split)
            batch.targets_BT[torch.from_numpy(beyond_BT)] = IGNORE
            yield batch

    def describe(self) -> dict[str, Any]:
        splits = {
            name: split.model_dump(include={"tokens", "documents", "bytes"}) for name, split in self.meta.splits.items()
        }
        return {"path": str(self.folder), "tokenizer": self.meta.tokenizer.kind, "sequences": len(self), **splits}

    def _windows(self, split: _Split, starts_B: np.ndarray) -> Batch:
        window_BL = split.tokens.gather(starts_B, self.sequence_length + 1)
        tokens_BT, targets_BT = window_BL[:, :-1].astype(np.int64), window_BL[:, 1:].astype(np.int64)
        if not self._mask:
            return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT))
        row_F, at_F = split.first_tokens(starts_B, self.sequence_length + 1)
        targets_BT[row_F, at_F - 1] = IGNORE
        return _masked(tokens_BT, targets_BT, row_F, at_F)

    def _packed(self, rows_B: np.ndarray) -> Batch:
        assert self._plan is not None, "rows are packed by a plan"
        plan, row = self._plan, self.sequence_length
        pieces_B = plan.first_R[rows_B + 1] - plan.first_R[rows_B]
        piece_P = ranges(plan.first_R[rows_B], pieces_B)
        row_P = np.repeat(np.arange(len(rows_B)), pieces_B)
        start_P, length_P = plan.start_P[piece_P], plan.length_P[piece_P]
        follow_P = length_P - plan.ends_P[piece_P]
        filled_B = np.bincount(row_P, length_P, len(rows_B)).astype(np.int64)
        at_P = np.cumsum(length_P) - length_P - (np.cumsum(filled_B) - filled_B)[row_P]

        tokens_BT = np.zeros((len(rows_B), row), dtype=np.int64)
        targets_BT = np.full_like(tokens_BT, IGNORE)
        tokens_N, targets_N = tokens_BT.ravel(), targets_BT.ravel()
        pieces = (start_P, length_P, follow_P, row_P * row + at_P)
        for start, length, follow, to in zip(*(piece.tolist() for piece in pieces), strict=True):
            piece_L = self._train.tokens.read(start, start + follow + 1)
            tokens_N[to : to + length] = piece_L[:length]
            targets_N[to : to + follow] = piece_L[1:]
        if not self._mask:
            return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT))
        row_F = np.concatenate([row_P, np.arange(len(rows_B))])  # padding counts as a document
        return _masked(tokens_BT, targets_BT, row_F, np.concatenate([at_P, filled_B]))


class _Split:
    """The tokens of a split and where its documents end. It is a ring."""

    def __init__(self, folder: Path, name: str, meta: Meta) -> None:
        split = meta.splits[name]
        self.tokens = (FlatTokens if meta.format == "tokens" else ShardTokens)(folder, split, meta.dtype)
        # Signed as the places that are looked up in it: searchsorted would otherwise convert all of it, every time.
        self.ends_D = map_file(folder / split.index.name, "uint64").view(np.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def first_tokens(self, starts_B: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(window, place in it) of every first token of a document that is not the window's own first token."""
        before_B = self._ends_up_to(starts_B)
        ends_B = self._ends_up_to(starts_B + length - 1) - before_B
        row_F = np.repeat(np.arange(len(starts_B)), ends_B)
        turn_F, d_F = np.divmod(ranges(before_B, ends_B), len(self.ends_D))
        return row_F, self.ends_D[d_F] + turn_F * len(self) - starts_B[row_F]

    def _ends_up_to(self, places_B: np.ndarray) -> np.ndarray:
        """How many documents have ended at or before each place, counting on where the ring begins again."""
        turn_B, within_B = np.divmod(places_B, len(self))
        return turn_B * len(self.ends_D) + np.searchsorted(self.ends_D, within_B, side="right")


def _masked(tokens_BT: np.ndarray, targets_BT: np.ndarray, row_F: np.ndarray, at_F: np.ndarray) -> Batch:
    """A batch with documents counted from 0 in each row and positions that restart at each document.

    Documents begin at place `at_F` of row `row_F`, where that lies within the row; each row's first place begins one.
    """
    rows, length = tokens_BT.shape
    inside_F = (at_F > 0) & (at_F < length)
    begin_S = np.concatenate([np.arange(rows) * length, (row_F * length + at_F)[inside_F]])
    begin_S.sort()
    length_S = np.diff(begin_S, append=rows * length)
    number_S = np.arange(len(begin_S)) - np.searchsorted(begin_S, begin_S // length * length)
    documents_BT = np.repeat(number_S, length_S).reshape(rows, length)
    positions_BT = (np.arange(rows * length) - np.repeat(begin_S, length_S)).reshape(rows, length)
    return Batch(*map(torch.from_numpy, (tokens_BT, targets_BT, documents_BT, positions_BT)))
