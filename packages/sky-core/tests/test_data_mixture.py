"""Mixtures: proportions that hold at every prefix, in random access, over members that fit together."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sky_core.components.tokenizer import Byte
from sky_core.data.dataset import Batch, Dataset
from sky_core.data.mixture import LONGEST_PERIOD, Mixture, chairman_assignment, integer_weights
from sky_core.errors import DataError


class Counting(Dataset):
    """Sequence i of member k is k in the first column and i in the second."""

    def __init__(self, member: int, *, end_of_text: bool = True, length: int = 3, masked: bool = False) -> None:
        self.member, self.masked, self.sequence_length = member, masked, length
        self.tokenizer = Byte(end_of_text=end_of_text).train(())

    @property
    def fingerprint(self) -> str:
        return str(self.member)

    def __len__(self) -> int:
        return 5

    def batch(self, start: int, count: int) -> Batch:
        tokens_BT = torch.zeros(count, self.sequence_length, dtype=torch.int64)
        tokens_BT[:, 0], tokens_BT[:, 1] = self.member, torch.arange(start, start + count)
        number_BT = torch.arange(self.sequence_length).expand(count, -1) if self.masked else None
        return Batch(tokens_BT, tokens_BT + 1, number_BT, None if number_BT is None else number_BT * 0)

    def validation(self, batch_size: int) -> Iterator[Batch]:
        yield self.batch(0, 2)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_every_prefix_is_within_one_sequence_of_its_share(weights: list[int]) -> None:
    chosen, total = chairman_assignment(weights), sum(weights)
    counts = [0] * len(weights)
    bound = 1 - Fraction(1, 2 * len(weights) - 2) if len(weights) > 1 else 0  # Tijdeman's theorem
    for t, k in enumerate(chosen, start=1):
        counts[k] += 1
        assert (
            max(abs(count - Fraction(weight * t, total)) for count, weight in zip(counts, weights, strict=True))
            <= bound
        )
    assert counts == weights


def test_the_largest_deficit_would_break_that_bound() -> None:
    """Why the obvious rule is not used: the weights that the module names."""
    weights = [53, 2, 2, 30, 2, 53]
    total, counts, worst = sum(weights), [0] * 6, 0.0
    for t in range(1, total + 1):
        deficits = [weight * t / total - count for weight, count in zip(weights, counts, strict=True)]
        counts[deficits.index(max(deficits))] += 1
        worst = max(worst, *(abs(weight * t / total - count) for weight, count in zip(weights, counts, strict=True)))
    assert worst > 1


def test_weights_are_taken_as_written() -> None:
    assert integer_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert integer_weights([2, 4]) == [1, 2]
    assert integer_weights([1e-3, 1]) == [1, 1000]
    assert integer_weights([5]) == [1]


@given(weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=6))
def test_awkward_weights_are_rounded_to_the_resolution(weights: list[float]) -> None:
    whole = integer_weights(weights)
    assert min(whole) >= 1
    assert sum(whole) <= LONGEST_PERIOD + len(whole)
    for weight, exact in zip(whole, weights, strict=True):
        assert abs(weight / sum(whole) - exact / sum(weights)) < 2 * len(weights) / LONGEST_PERIOD


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=4), start=st.integers(0, 500), count=st.integers(1, 40))
def test_any_sequence_can_be_read_at_any_time(weights: list[int], start: int, count: int) -> None:
    mixture = Mixture([(weight, Counting(k)) for k, weight in enumerate(weights)])
    history = [0] * len(weights)
    wanted = []
    for i in range(start + count):
        k = chairman_assignment(mixture.weights)[i % sum(mixture.weights)]
        wanted.append([k, history[k]])
        history[k] += 1
    batch = mixture.batch(start, count)
    assert batch.tokens_BT[:, :2].tolist() == wanted[start:]
    assert torch.equal(batch.targets_BT, batch.tokens_BT + 1)


def test_rows_of_a_member_without_documents_count_as_one_document() -> None:
    mixture = Mixture([(1, Counting(0)), (1, Counting(1, masked=True))])
    batch = mixture.batch(0, 4)
    assert batch.documents_BT is not None
    assert batch.positions_BT is not None
    for member, documents_T, positions_T in zip(
        batch.tokens_BT[:, 0].tolist(), batch.documents_BT.tolist(), batch.positions_BT.tolist(), strict=True
    ):
        assert (documents_T, positions_T) == (([0, 1, 2], [0, 0, 0]) if member else ([0, 0, 0], [0, 1, 2]))


def test_validation_is_that_of_all_members() -> None:
    batches = list(Mixture([(1, Counting(0)), (9, Counting(1))]).validation(2))
    assert [batch.tokens_BT[0, 0].item() for batch in batches] == [0, 1]


def test_members_must_share_the_tokenizer_and_the_length() -> None:
    one, other = Counting(0), Counting(1, end_of_text=False)
    with pytest.raises(DataError, match=rf"\({one.tokenizer.fingerprint} and {other.tokenizer.fingerprint}\)"):
        Mixture([(1, one), (1, other)])
    with pytest.raises(DataError, match="members 1 and 2 have sequences of 3 and 4 tokens"):
        Mixture([(1, one), (1, Counting(1, length=4))])


def test_the_fingerprint_follows_members_and_weights() -> None:
    prints = {
        Mixture([(weight, Counting(0)), (1, Counting(member))]).fingerprint for weight in (1, 2) for member in (1, 2)
    }
    assert len(prints) == 4
    assert Mixture([(2, Counting(0)), (2, Counting(1))]).fingerprint in prints
