"""Best-fit packing: whole documents side by side in rows of T, with the fewest cuts and almost no padding.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830), section 3: documents longer than a
row are cut into rows and a rest; the rests are packed best-fit-decreasing: longest first, each into the row that it
fills best. With lengths bounded by T the row is found in O(1) instead of their O(log N): one stack of rows per number
of free places, and a T-bit integer that says which stacks are not empty.

The plan is a function of the document lengths alone, computed once, so any row can be read at any time. What differs
from epoch to epoch is the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Row r holds the pieces `first_R[r] .. first_R[r+1]-1`; piece p is `length_P[p]` tokens from `start_P[p]` on.

    `ends_P[p]`: the piece ends its document.
    """

    first_R: np.ndarray
    start_P: np.ndarray
    length_P: np.ndarray
    ends_P: np.ndarray

    def __len__(self) -> int:
        return len(self.first_R) - 1


def best_fit(ends_D: np.ndarray, row: int) -> Plan:
    """Pack documents that end at `ends_D` (one past their last token) into rows of `row` tokens."""
    ends_D = np.asarray(ends_D, dtype=np.int64)
    starts_D = np.concatenate([[0], ends_D[:-1]])
    full_D, rest_D = np.divmod(ends_D - starts_D, row)
    whole_F = ranges(starts_D, full_D, row)
    rests = np.flatnonzero(rest_D)
    rests = rests[np.argsort(-rest_D[rests], kind="stable")]
    rest_start_N = (ends_D - rest_D)[rests]
    rest_length_N = rest_D[rests]
    row_N = _assign(rest_length_N.tolist(), row)
    by_row = np.argsort(row_N, kind="stable")
    rows = int(row_N.max()) + 1 if row_N.size else 0
    pieces_R = np.concatenate([np.ones(len(whole_F), dtype=np.int64), np.bincount(row_N, minlength=rows)])
    return Plan(
        first_R=np.concatenate([[0], np.cumsum(pieces_R)]),
        start_P=np.concatenate([whole_F, rest_start_N[by_row]]),
        length_P=np.concatenate([np.full(len(whole_F), row), rest_length_N[by_row]]),
        ends_P=np.concatenate([np.isin(whole_F + row, ends_D), np.ones(len(by_row), dtype=bool)]),
    )


def ranges(starts: np.ndarray, counts: np.ndarray, step: int = 1) -> np.ndarray:
    """starts[i], starts[i] + step, ... `counts[i]` of them, for every i, in one array."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts, counts) + step * (np.arange(counts.sum()) - np.repeat(before, counts))


def _assign(lengths: list[int], row: int) -> np.ndarray:
    """The row of each piece; `lengths` fall from left to right and are below `row`."""
    rows_with_free: list[list[int]] = [[] for _ in range(row + 1)]
    some_free = rows = 0
    assigned = np.empty(len(lengths), dtype=np.int64)
    for i, length in enumerate(lengths):
        fitting = some_free >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            chosen = rows_with_free[free].pop()
            if not rows_with_free[free]:
                some_free ^= 1 << free
        else:
            free, chosen, rows = row, rows, rows + 1
        left = free - length
        if left:
            rows_with_free[left].append(chosen)
            some_free |= 1 << left
        assigned[i] = chosen
    return assigned
