"""A weighted mixture of datasets whose proportions hold at every moment, in random access.

Which dataset gives sequence i? Tijdeman 1980, "The chairman assignment problem": with weights p_k, at step t, among
the K datasets whose deficit p_k t - count_k is at least 1 / (2K - 2), take the one that would be the first to fall a
whole turn behind: the least (1 - 1/(2K - 2) - deficit) / p_k. Then |count_k - p_k t| <= 1 - 1/(2K - 2) for every k
and t, which is the best possible. Always taking the largest deficit, the obvious rule, breaks the bound of one sequence
(weights 53, 2, 2, 30, 2, 53).

With integer weights the choices repeat after their sum, so one period is written down and sequence i needs no history.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np
import torch

from sky_core.data.dataset import Batch, Dataset
from sky_core.errors import DataError

LONGEST_PERIOD = 1 << 16
"""Weights whose period would be longer are rounded to this resolution."""


def integer_weights(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the proportion of `weights` as written (0.7 is 7/10), rounded if the period needs it."""
    exact = [Fraction(str(weight)) for weight in weights]
    common = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    if sum(whole) // gcd(*whole) > LONGEST_PERIOD:
        total = sum(whole)
        whole = [max(1, round(weight * LONGEST_PERIOD / total)) for weight in whole]
    shared = gcd(*whole)
    return [weight // shared for weight in whole]


def chairman_assignment(weights: Sequence[int]) -> list[int]:
    """One period: sum(weights) choices, k chosen weights[k] times, every prefix within one of its share."""
    total, slack = sum(weights), max(1, 2 * len(weights) - 2)
    deficits = [0] * len(weights)  # times `total`
    chosen = []
    for _ in range(total):
        deficits = [deficit + weight for deficit, weight in zip(deficits, weights, strict=True)]
        eligible = [k for k, deficit in enumerate(deficits) if slack * deficit >= total]
        urgent = min(eligible, key=lambda k: Fraction(total * (slack - 1) - slack * deficits[k], weights[k]))
        deficits[urgent] -= total
        chosen.append(urgent)
    return chosen


class Mixture(Dataset):
    """Sequences of several datasets, interleaved by weight. Each keeps its own order and its own epochs.

    `members` are (weight, dataset), `names` what evaluations call them (default: 1, 2, ...). A mixture has no epoch of
    its own: `len` is the number of sequences that its members hold together. Raises `DataError` when members differ in
    tokenizer or sequence length, or share a name.
    """

    def __init__(self, members: Sequence[tuple[float, Dataset]], names: Sequence[str] | None = None) -> None:
        self.members = [dataset for _, dataset in members]
        self.names = list(names or map(str, range(1, len(members) + 1)))
        if twice := {name for name in self.names if self.names.count(name) > 1}:
            raise DataError(f"mixture: {len(twice)} names stand for more than one member ({', '.join(sorted(twice))})")
        self.weights = integer_weights([weight for weight, _ in members])
        self.tokenizer, self.sequence_length = self.members[0].tokenizer, self.members[0].sequence_length
        for number, member in enumerate(self.members[1:], start=2):
            if member.tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise DataError(
                    f"mixture: members 1 and {number} have different tokenizers ({self.tokenizer.fingerprint} and "
                    f"{member.tokenizer.fingerprint}); prepare them with the same (sky data prepare --tokenizer FOLDER)"
                )
            if member.sequence_length != self.sequence_length:
                raise DataError(
                    f"mixture: members 1 and {number} have sequences of {self.sequence_length} and "
                    f"{member.sequence_length} tokens; give all the same sequence_length"
                )
        self._choice_P = np.array(chairman_assignment(self.weights))
        of_member_KP = self._choice_P == np.arange(len(self.members))[:, None]
        self._before_KP = np.cumsum(of_member_KP, axis=1) - of_member_KP

    @property
    def fingerprint(self) -> str:
        facts = [self.weights, [member.fingerprint for member in self.members]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(len(member) for member in self.members)

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(member, its own sequence number) of the sequences start .. start + count - 1."""
        periods_B, place_B = np.divmod(np.arange(start, start + count), len(self._choice_P))
        member_B = self._choice_P[place_B]
        return member_B, periods_B * np.array(self.weights)[member_B] + self._before_KP[member_B, place_B]

    def batch(self, start: int, count: int) -> Batch:
        member_B, local_B = self.locate(start, count)
        parts, rows = [], []
        for k in np.unique(member_B).tolist():
            rows.append(np.flatnonzero(member_B == k))
            parts.append(self.members[k].batch(int(local_B[rows[-1][0]]), len(rows[-1])))
        return _joined(parts, torch.from_numpy(np.argsort(np.concatenate(rows))))

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """The validation splits of all members, one after the other."""
        for member in self.members:
            yield from member.validation(batch_size)

    def domains(self) -> dict[str, Dataset]:
        return dict(zip(self.names, self.members, strict=True))

    def describe(self) -> dict[str, Any]:
        shares = [weight / sum(self.weights) for weight in self.weights]
        return {
            "members": [
                {"share": share, **member.describe()} for share, member in zip(shares, self.members, strict=True)
            ]
        }


def _joined(parts: list[Batch], order_B: torch.Tensor) -> Batch:
    """The rows of all parts in the given order. Where only some parts number documents, a row of the others is one."""
    if any(part.documents_BT is not None for part in parts):
        parts = [part if part.documents_BT is not None else _one_document(part) for part in parts]
    if len({frozenset(part.extra) for part in parts}) > 1:
        raise DataError("mixture: some members carry extra tensors that others lack; mix datasets of the same kind")

    def join(tensors: list[torch.Tensor | None]) -> Any:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present).index_select(0, order_B) if present else None

    return Batch(
        join([part.tokens_BT for part in parts]),
        join([part.targets_BT for part in parts]),
        join([part.documents_BT for part in parts]),
        join([part.positions_BT for part in parts]),
        {name: join([part.extra[name] for part in parts]) for name in parts[0].extra},
    )


def _one_document(batch: Batch) -> Batch:
    positions_BT = torch.arange(batch.tokens_BT.shape[1]).expand_as(batch.tokens_BT)
    return replace(batch, documents_BT=torch.zeros_like(batch.tokens_BT), positions_BT=positions_BT)
