"""Sequences from a prepared folder, memory-mapped and in random access: the dataset that models are trained on.

B batch (sequences), T time (tokens), N tokens of a split, D documents, L = T + 1.

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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sky_core.data.dataset import IGNORE, Batch, Dataset
from sky_core.data.packing import best_fit
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
        self._seed = seed
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
        phases = {epoch: draw(len(self._train), self._seed, epoch) for epoch in np.unique(epochs_B).tolist()}
        phases_B = np.array([phases[epoch] for epoch in epochs_B.tolist()], dtype=np.int64)
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
        first_BL = split.first_tokens(starts_B, self.sequence_length + 1)
        targets_BT[first_BL[:, 1:]] = IGNORE
        return _masked(tokens_BT, targets_BT, first_BL[:, :-1])

    def _packed(self, rows_B: np.ndarray) -> Batch:
        assert self._plan is not None, "rows are packed by a plan"
        tokens_BT = np.zeros((len(rows_B), self.sequence_length), dtype=np.int64)
        targets_BT = np.full_like(tokens_BT, IGNORE)
        first_BT = np.zeros(tokens_BT.shape, dtype=bool)
        for b, row in enumerate(rows_B.tolist()):
            at = 0
            for piece in range(self._plan.first_R[row], self._plan.first_R[row + 1]):
                start, length = int(self._plan.start_P[piece]), int(self._plan.length_P[piece])
                follow = length - int(self._plan.ends_P[piece])
                piece_L = self._train.tokens.read(start, start + follow + 1)
                tokens_BT[b, at : at + length] = piece_L[:length]
                targets_BT[b, at : at + follow] = piece_L[1:]
                first_BT[b, at] = True
                at += length
            first_BT[b, at : at + 1] = True
        if self._mask:
            return _masked(tokens_BT, targets_BT, first_BT)
        return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT))


class _Split:
    """The tokens of a split and where its documents end."""

    def __init__(self, folder: Path, name: str, meta: Meta) -> None:
        split = meta.splits[name]
        self.tokens = (FlatTokens if meta.format == "tokens" else ShardTokens)(folder, split, meta.dtype)
        self.ends_D = map_file(folder / split.index.name, "uint64")

    def __len__(self) -> int:
        return len(self.tokens)

    def first_tokens(self, starts_B: np.ndarray, length: int) -> np.ndarray:
        """Where the windows hold the first token of a document: booleans (B, length). The split is a ring."""
        first_BL = np.zeros((len(starts_B), length), dtype=bool)
        low_B = np.searchsorted(self.ends_D, starts_B.astype(np.uint64))
        high_B = np.searchsorted(self.ends_D, (starts_B + length).astype(np.uint64))
        for b in np.flatnonzero(high_B > low_B).tolist():
            first_BL[b, self.ends_D[low_B[b] : high_B[b]].astype(np.int64) - starts_B[b]] = True
        for b in np.flatnonzero(starts_B + length > len(self)).tolist():
            wrapped = np.uint64(starts_B[b] + length - len(self))
            around = self.ends_D[: np.searchsorted(self.ends_D, wrapped)].astype(np.int64)
            first_BL[b, around + len(self) - starts_B[b]] = True
        return first_BL


def _masked(tokens_BT: np.ndarray, targets_BT: np.ndarray, first_BT: np.ndarray) -> Batch:
    """A batch with documents counted from 0 in each row and positions that restart at each document."""
    t_T = np.arange(tokens_BT.shape[1])
    rows_N, at_N = np.nonzero(first_BT)
    before_N = np.where(np.diff(rows_N, prepend=-1) == 0, np.roll(at_N, 1), 0)
    begins_BT = np.zeros_like(tokens_BT)
    begins_BT[rows_N, at_N] = at_N - before_N
    positions_BT = t_T - np.cumsum(begins_BT, axis=1)
    documents_BT = np.cumsum(first_BT, axis=1) - first_BT[:, :1]
    return Batch(
        torch.from_numpy(tokens_BT),
        torch.from_numpy(targets_BT),
        torch.from_numpy(documents_BT),
        torch.from_numpy(positions_BT),
    )
