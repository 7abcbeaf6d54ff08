"""The contract of a dataset: an endless stream with random access, and a validation split read once in order.

B batch (sequences), T time (tokens).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from sky_core.data.dataset import IGNORE, Batch
from sky_core.data.dataset import Dataset as BuiltDataset
from sky_core.slots import Dataset
from sky_core.testing.component import ComponentContract

Row = tuple[tuple[int, ...], tuple[int, ...]]


class DatasetContract(ComponentContract):
    """A dataset. Override `make` when the component reads files: a hundred short sequences, no two of them equal."""

    base = Dataset
    next_token: ClassVar[bool] = True
    """Targets are the tokens shifted by one."""
    slack: ClassVar[int] = 0
    """Targets that an epoch may leave out at the ends (windows that begin elsewhere in every epoch)."""
    reshuffles: ClassVar[bool] = True
    """The order of the training sequences depends on the seed and changes from epoch to epoch."""
    validates: ClassVar[bool] = True
    """Has a validation split."""

    def make(self, folder: Path) -> Dataset:
        """The component to build, with its files written under `folder`."""
        return self.component

    def built(self, folder: Path, seed: int = 0) -> BuiltDataset:
        return self.make(folder).build(seed, None)

    @pytest.fixture
    def dataset(self, tmp_path: Path) -> BuiltDataset:
        return self.built(tmp_path)

    def test_sequences_have_the_promised_form(self, dataset: BuiltDataset) -> None:
        batch = dataset.batch(0, 3)
        assert batch.tokens_BT.shape == batch.targets_BT.shape == (3, dataset.sequence_length)
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
        assert batch.tokens_BT.device.type == "cpu"
        assert ((batch.tokens_BT >= 0) & (batch.tokens_BT < dataset.tokenizer.vocab_size)).all()
        carried = batch.targets_BT[batch.targets_BT != IGNORE]
        assert ((carried >= 0) & (carried < dataset.tokenizer.vocab_size)).all()

    def test_targets_are_the_next_tokens(self, dataset: BuiltDataset) -> None:
        if not self.next_token:
            pytest.skip("next_token = False: another kind of target")
        batch = dataset.batch(0, 4)
        tokens_BT, targets_BT = batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1]
        carried = targets_BT != IGNORE
        assert carried.any()
        assert torch.equal(targets_BT[carried], tokens_BT[carried])

    def test_a_sequence_is_the_same_whatever_was_read_before(self, tmp_path: Path) -> None:
        one, two = self.built(tmp_path), self.built(tmp_path)
        two.batch(11, 2)
        assert rows(one.batch(3, 5)) == rows(one.batch(0, 9))[3:8] == rows(two.batch(3, 5))

    def test_ranks_read_disjoint_parts_that_are_together_the_stream(self, dataset: BuiltDataset) -> None:
        parts = [rows(dataset.batch(step * 6 + rank * 2, 2)) for step in range(2) for rank in range(3)]
        assert [row for part in parts for row in part] == rows(dataset.batch(0, 12))

    def test_an_epoch_holds_every_sequence_once(self, dataset: BuiltDataset) -> None:
        size = len(dataset)
        assert size > 0
        epochs = [rows(dataset.batch(epoch * size, size)) for epoch in range(2)]
        assert all(len(set(epoch)) == size for epoch in epochs), "a sequence comes twice in an epoch"
        self._same_content(*epochs)

    def _same_content(self, one: list[Row], two: list[Row]) -> None:
        """The same sequences, or with `slack` the same targets up to that many."""
        if self.slack == 0:
            assert Counter(one) == Counter(two)
        mine, theirs = (Counter(y for _, targets in epoch for y in targets if y != IGNORE) for epoch in (one, two))
        assert max((mine - theirs).total(), (theirs - mine).total()) <= self.slack

    def test_epochs_and_seeds_differ_in_order(self, tmp_path: Path) -> None:
        if not self.reshuffles:
            pytest.skip("reshuffles = False: a fixed order")
        dataset, other = self.built(tmp_path), self.built(tmp_path, seed=1)
        size = len(dataset)
        assert size > 3, "give the contract a few more sequences"
        assert rows(dataset.batch(0, size)) != rows(dataset.batch(size, size))
        assert rows(dataset.batch(0, size)) != rows(other.batch(0, size))
        self._same_content(rows(dataset.batch(0, size)), rows(other.batch(0, size)))

    def test_a_batch_may_cross_the_border_of_epochs(self, dataset: BuiltDataset) -> None:
        size = len(dataset)
        assert rows(dataset.batch(size - 1, 2)) == rows(dataset.batch(size - 1, 1)) + rows(dataset.batch(size, 1))

    def test_the_validation_split_is_read_whole_whatever_the_batch_size(self, dataset: BuiltDataset) -> None:
        if not self.validates:
            pytest.skip("validates = False: no validation split")
        ones, threes = (_targets(dataset.validation(size)) for size in (1, 3))
        assert ones
        assert ones == threes == _targets(dataset.validation(1))

    def test_positions_restart_with_each_document(self, dataset: BuiltDataset) -> None:
        batch = dataset.batch(0, 4)
        if batch.documents_BT is None:
            pytest.skip("the dataset does not number documents")
        if batch.positions_BT is not None:
            starts_BT = batch.documents_BT[:, 1:] != batch.documents_BT[:, :-1]
            assert not batch.positions_BT[:, 1:][starts_BT].any()
            assert (batch.positions_BT.diff(dim=1)[~starts_BT] == 1).all()

    def test_the_fingerprint_stays_with_the_data(self, tmp_path: Path) -> None:
        assert self.built(tmp_path).fingerprint == self.built(tmp_path).fingerprint
        if self.reshuffles:
            assert self.built(tmp_path).fingerprint != self.built(tmp_path, seed=1).fingerprint

    def test_batches_move_and_split(self, dataset: BuiltDataset) -> None:
        batch = dataset.batch(0, 4)
        assert rows(batch.rows(1, 3)) == rows(batch)[1:3]
        assert batch.rows(0, 1).n_targets() + batch.rows(1, 4).n_targets() == batch.n_targets()


def rows(batch: Batch) -> list[Row]:
    """The sequences of a batch as (tokens, targets), to compare and count."""
    return [(tuple(x), tuple(y)) for x, y in zip(batch.tokens_BT.tolist(), batch.targets_BT.tolist(), strict=True)]


def _targets(batches: Any) -> list[int]:
    return [target for batch in batches for target in batch.targets_BT[batch.targets_BT != IGNORE].tolist()]
