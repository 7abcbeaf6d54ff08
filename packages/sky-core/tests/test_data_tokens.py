"""Token files as sequences: every target once an epoch, exact resume, documents kept apart, damage noticed.

B batch (sequences), T time (tokens), N tokens of a split.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sky_core.components.tokenizer import Byte
from sky_core.data import shards
from sky_core.data.dataset import IGNORE, Batch
from sky_core.data.loader import Loader
from sky_core.data.packing import best_fit
from sky_core.data.prepare import prepare
from sky_core.data.prepared import META, Meta
from sky_core.data.read import Document
from sky_core.data.tokens import TokenFiles
from sky_core.errors import DataError
from sky_core.tokenizer.base import Tokenizer

T = 16


class Numbers(Tokenizer):
    """Every character is its code point: the tokens of a corpus can be told apart, which bytes cannot."""

    kind = "numbers"
    special = {"<|endoftext|>": 60_000}
    vocab_size = 60_001

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode_bytes(self, ids: Any) -> bytes:
        return b"".join(chr(i).encode() for i in ids if i != 60_000)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def save(self, folder: Path) -> None:
        Byte().train(()).save(folder)


@pytest.fixture(autouse=True)
def numbers_load_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sky_core.data.tokens.load_tokenizer", lambda folder: Numbers())


def numbered(lengths: list[int]) -> list[Document]:
    """Documents of the given lengths in which no character occurs twice."""
    start, documents = 0x100, []
    for i, length in enumerate(lengths):
        documents.append(Document(f"d{i}", "".join(map(chr, range(start, start + length))), "memory"))
        start += length
    assert start < 0xD800, "surrogates begin here"
    return documents


def made(folder: Path, lengths: list[int], *, format: Any = "tokens", validation: float = 0.2) -> Path:
    prepare(numbered(lengths), folder, Numbers(), split="position", validation=validation, format=format)
    return folder


def stored(folder: Path, split: str) -> np.ndarray:
    return np.fromfile(folder / f"{split}.bin", "<u2").astype(np.int64)


def carried(batch: Batch) -> list[int]:
    return batch.targets_BT[batch.targets_BT != IGNORE].tolist()


LENGTHS = [5, 40, 3, 100, 17, 16, 1, 33, 60, 7, 90, 250, 12, 80, 30]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "data", LENGTHS)


# The stream


def test_a_target_is_the_token_that_follows(folder: Path) -> None:
    ring = stored(folder, "train")
    after = dict(zip(ring.tolist(), np.roll(ring, -1).tolist(), strict=True))
    batch = TokenFiles(folder, T).batch(0, 30)
    for token, target in zip(batch.tokens_BT.flatten().tolist(), batch.targets_BT.flatten().tolist(), strict=True):
        assert target == after[token] or token == 60_000
    assert torch.equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])


@settings(max_examples=20, deadline=None)
@given(length=st.integers(2, 70), sequence_length=st.integers(1, 30), epoch=st.integers(0, 3), seed=st.integers(0, 3))
def test_each_epoch_has_every_token_as_a_target_once_but_a_remainder(
    tmp_path_factory: pytest.TempPathFactory, length: int, sequence_length: int, epoch: int, seed: int
) -> None:
    folder = made(tmp_path_factory.mktemp("data") / "out", [length + sequence_length], validation=0.0)
    dataset = TokenFiles(folder, sequence_length, seed=seed)
    n = len(stored(folder, "train"))
    assert len(dataset) == n // sequence_length
    targets = carried(dataset.batch(epoch * len(dataset), len(dataset)))
    assert len(targets) == len(set(targets)) == n - n % sequence_length


def test_epochs_are_cut_at_other_places_and_read_in_another_order(folder: Path) -> None:
    dataset = TokenFiles(folder, T)
    starts = [dataset.batch(epoch * len(dataset), len(dataset)).tokens_BT[:, 0].tolist() for epoch in range(8)]
    assert len({frozenset(starts_B) for starts_B in starts}) == 8
    assert all(starts_B != sorted(starts_B) for starts_B in starts)
    assert TokenFiles(folder, T, seed=1).batch(0, 8).tokens_BT[:, 0].tolist() != starts[0][:8]


@pytest.mark.parametrize("options", [{}, {"documents": "mask"}, {"packing": "best_fit"}])
def test_any_sequence_can_be_read_at_any_time(folder: Path, options: dict[str, Any]) -> None:
    dataset = TokenFiles(folder, T, **options)
    whole = dataset.batch(0, 3 * len(dataset))
    assert whole.tokens_BT.is_contiguous()
    assert whole.targets_BT.is_contiguous()
    for start, count in [(0, 1), (5, 7), (len(dataset) - 1, 2), (len(dataset) * 2 - 3, 6), (40, 0)]:
        part, again = dataset.batch(start, count), TokenFiles(folder, T, **options).batch(start, count)
        for name in ("tokens_BT", "targets_BT", "documents_BT", "positions_BT"):
            want = getattr(whole.rows(start, start + count), name)
            assert want is None or torch.equal(getattr(part, name), want)
            assert want is None or torch.equal(getattr(again, name), want)


def test_going_on_from_one_integer_equals_never_having_stopped(folder: Path) -> None:
    dataset = TokenFiles(folder, T)
    with Loader(dataset, 0, 4) as loader:
        undisturbed = [next(loader).tokens_BT for _ in range(30)]
    with Loader(dataset, 0, 4) as loader:
        before = [next(loader).tokens_BT for _ in range(11)]
        position = loader.position
    with Loader(TokenFiles(folder, T), position, 4) as loader:
        after = [next(loader).tokens_BT for _ in range(19)]
    assert torch.equal(torch.cat(undisturbed), torch.cat([*before, *after]))


def test_two_ranks_see_together_what_one_sees(folder: Path) -> None:
    dataset = TokenFiles(folder, T)
    with Loader(dataset, 0, 8) as one, Loader(dataset, 0, 4, stride=8) as a, Loader(dataset, 4, 4, stride=8) as b:
        for _ in range(20):
            assert torch.equal(next(one).tokens_BT, torch.cat([next(a).tokens_BT, next(b).tokens_BT]))


def test_the_fingerprint_changes_with_data_seed_and_options(tmp_path: Path, folder: Path) -> None:
    other = made(tmp_path / "other", [*LENGTHS, 1])
    prints = [
        TokenFiles(folder, T).fingerprint,
        TokenFiles(folder, T + 1).fingerprint,
        TokenFiles(folder, T, seed=1).fingerprint,
        TokenFiles(folder, T, documents="mask").fingerprint,
        TokenFiles(folder, T, packing="best_fit").fingerprint,
        TokenFiles(other, T).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert TokenFiles(folder, T, verify=False).fingerprint == prints[0]


# Validation


@pytest.mark.parametrize("length", [1, 2, T, T + 1, T + 2, 5 * T + 1, 97])
@pytest.mark.parametrize("format", ["tokens", "shards"])
def test_validation_has_every_target_once_in_order(tmp_path: Path, length: int, format: str) -> None:
    documents = numbered([9 * length + 100, length])
    fraction = (length - 0.5) / (10 * length + 100)
    prepare(documents, tmp_path / "d", Numbers(), split="position", validation=fraction, format=format)  # type: ignore[arg-type]
    batches = list(TokenFiles(tmp_path / "d", T).validation(3))
    targets = [target for batch in batches for target in carried(batch)]
    assert targets == [*map(ord, documents[1].text[1:]), 60_000]
    assert all(batch.tokens_BT.shape[1] == T and len(batch.tokens_BT) <= 3 for batch in batches)


def test_masked_validation_leaves_out_first_tokens_only(folder: Path) -> None:
    batches = TokenFiles(folder, T, documents="mask").validation(4)
    targets = Counter(target for batch in batches for target in carried(batch))
    tokens = stored(folder, "validation")
    first = {0, *np.flatnonzero(tokens == 60_000) + 1}
    assert targets == Counter(token for i, token in enumerate(tokens.tolist()) if i not in first)


def test_without_a_validation_split_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    dataset = TokenFiles(made(tmp_path / "data", LENGTHS, validation=0.0), T)
    with pytest.raises(DataError, match=r"without a validation split; prepare it with --validation 0\.1"):
        next(dataset.validation(1))


# Documents


def expected_documents(tokens_T: list[int]) -> tuple[list[int], list[int]]:
    """Document numbers and positions by the definition: a new document after each end of text."""
    documents, positions, document, position = [], [], 0, 0
    for token in tokens_T:
        documents.append(document)
        positions.append(position)
        position += 1
        if token == 60_000:
            document, position = document + 1, 0
    return documents, positions


def test_masked_documents_and_positions_restart_after_each_end_of_text(folder: Path) -> None:
    dataset = TokenFiles(folder, T, documents="mask")
    plain = TokenFiles(folder, T).batch(0, 2 * len(dataset))
    masked = dataset.batch(0, 2 * len(dataset))
    assert torch.equal(masked.tokens_BT, plain.tokens_BT)
    assert masked.documents_BT is not None
    assert masked.positions_BT is not None
    last = 0x100 + sum(LENGTHS) * 4 // 5 - 1  # the split was cut here: a border without an end of text
    for b in range(len(masked.tokens_BT)):
        tokens_T = masked.tokens_BT[b].tolist()
        if last in tokens_T[:-1]:
            continue
        documents_T, positions_T = expected_documents(tokens_T)
        assert masked.documents_BT[b].tolist() == documents_T
        assert masked.positions_BT[b].tolist() == positions_T
    border_BT = (masked.tokens_BT == 60_000) | (masked.tokens_BT == last)
    assert torch.equal(masked.targets_BT, plain.targets_BT.masked_fill(border_BT, IGNORE))


@settings(max_examples=25, deadline=None)
@example(lengths=[1, 1, 1], sequence_length=30, starts=[], format="tokens")
@given(
    lengths=st.lists(st.integers(1, 12), min_size=3, max_size=12),
    sequence_length=st.integers(1, 30),
    starts=st.lists(st.integers(0, 10**6), max_size=5),
    format=st.sampled_from(["tokens", "shards"]),
)
def test_first_tokens_are_those_after_an_end_on_the_ring(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int, starts: list[int], format: str
) -> None:
    """By the definition, token by token; windows longer than the split go around it more than once."""
    folder = made(tmp_path_factory.mktemp("data") / "out", [40, *lengths], format=format)
    dataset = TokenFiles(folder, sequence_length, documents="mask")
    for split in dataset._splits.values():
        n, ends = len(split), {int(end) % len(split) for end in split.ends_D}
        starts_B = np.array([start % n for start in starts], dtype=np.int64)
        batch = dataset._windows(split, starts_B)
        ring = split.tokens.read(0, n).tolist()
        assert batch.documents_BT is not None
        assert batch.positions_BT is not None
        for b, start in enumerate(starts_B.tolist()):
            document = position = 0
            for t in range(sequence_length):
                if t and (start + t) % n in ends:
                    document, position = document + 1, 0
                follows = (start + t + 1) % n
                row = (
                    batch.tokens_BT[b, t],
                    batch.targets_BT[b, t],
                    batch.documents_BT[b, t],
                    batch.positions_BT[b, t],
                )
                target = IGNORE if follows in ends else ring[follows]
                assert list(map(int, row)) == [ring[(start + t) % n], target, document, position]
                position += 1


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40), row=st.integers(1, 20))
def test_packing_puts_every_token_in_one_row_and_fills_no_row_over(lengths: list[int], row: int) -> None:
    ends = np.cumsum(lengths)
    plan = best_fit(ends, row)
    tokens: list[int] = []
    for r in range(len(plan)):
        pieces = range(plan.first_R[r], plan.first_R[r + 1])
        assert 0 < sum(int(plan.length_P[p]) for p in pieces) <= row
        for p in pieces:
            start, length = int(plan.start_P[p]), int(plan.length_P[p])
            tokens += range(start, start + length)
            end = int(ends[np.searchsorted(ends, start, side="right")])
            assert start + length <= end, "a piece lies in one document"
            assert bool(plan.ends_P[p]) is (start + length == end)
    assert sorted(tokens) == list(range(ends[-1]))


def test_packing_is_best_fit_decreasing() -> None:
    """By hand, rows of 10: 7 | 5 | 3 joins 7, which it fills, though 5 has more room | 2 joins 5."""
    plan = best_fit(np.cumsum([2, 7, 3, 5]), 10)
    rows = [sorted(plan.length_P[plan.first_R[r] : plan.first_R[r + 1]].tolist()) for r in range(len(plan))]
    assert sorted(rows) == [[2, 5], [3, 7]]


def test_packing_hundreds_of_thousands_of_documents_takes_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 300_000)
    start = time.process_time()
    plan = best_fit(np.cumsum(lengths), 1024)
    assert time.process_time() - start < 5
    assert lengths.sum() / (len(plan) * 1024) > 0.99


def test_packed_rows_hold_whole_documents_and_every_target_inside_of_one(folder: Path) -> None:
    dataset = TokenFiles(folder, T, packing="best_fit", documents="mask")
    batch = dataset.batch(0, len(dataset))
    tokens = stored(folder, "train")
    first = {0, *np.flatnonzero(tokens == 60_000) + 1}
    wanted = Counter(token for i, token in enumerate(tokens.tolist()) if i not in first)
    assert Counter(carried(batch)) == wanted
    assert batch.documents_BT is not None
    assert batch.positions_BT is not None
    for b in range(len(dataset)):
        padded_T = batch.tokens_BT[b] == 0
        assert (batch.targets_BT[b][padded_T] == IGNORE).all()
        documents_T, positions_T = expected_documents(batch.tokens_BT[b].tolist())
        inside = int((~padded_T).sum())
        assert batch.documents_BT[b].tolist()[:inside] == documents_T[:inside]
        assert batch.positions_BT[b].tolist()[:inside] == positions_T[:inside]
        assert not set(batch.documents_BT[b][padded_T].tolist()) & set(documents_T[:inside])


# Shards


@pytest.mark.parametrize("options", [{}, {"documents": "mask"}, {"packing": "best_fit"}])
def test_shards_give_the_sequences_of_token_files(
    tmp_path: Path, folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MEMBER", 50)
    monkeypatch.setattr(shards, "SHARD", 2000)  # three members of 612 bytes with their headers and padding
    other = made(tmp_path / "shards", LENGTHS, format="shards")
    assert len(list(other.glob("train-*.tar"))) > 2
    one, two = TokenFiles(folder, T, **options), TokenFiles(other, T, **options)
    a, b = (dataset.batch(0, 2 * len(one)) for dataset in (one, two))
    assert torch.equal(a.tokens_BT, b.tokens_BT)
    assert torch.equal(a.targets_BT, b.targets_BT)
    for x, y in zip(one.validation(2), two.validation(2), strict=True):
        assert torch.equal(x.targets_BT, y.targets_BT)


# Damage


@pytest.mark.parametrize("format", ["tokens", "shards"])
def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path, format: str) -> None:
    folder = made(tmp_path / "data", LENGTHS, format=format)
    for file in Meta.read(folder).all_files():
        path = folder / file.name
        good = path.read_bytes()
        path.write_bytes(good[:-3])
        message = (
            rf"{file.name}: truncated: {file.size - 3:,} bytes, {file.size:,} were written; prepare the data again"
        )
        with pytest.raises(DataError, match=message):
            TokenFiles(folder, T, verify=False)
        path.unlink()
        with pytest.raises(DataError, match=f"{file.name}: missing; prepare the data again"):
            TokenFiles(folder, T, verify=False)
        path.write_bytes(good)


@pytest.mark.parametrize("format", ["tokens", "shards"])
def test_a_flipped_bit_is_noticed_and_the_file_named(tmp_path: Path, format: str) -> None:
    folder = made(tmp_path / "data", LENGTHS, format=format)
    for file in Meta.read(folder).all_files():
        path = folder / file.name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{file.name}: damaged: its SHA-256 begins .*; prepare the data again"):
            TokenFiles(folder, T)
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    assert len(TokenFiles(folder, T))


def test_a_corpus_shorter_than_a_sequence_gives_both_numbers(tmp_path: Path) -> None:
    folder = made(tmp_path / "data", [10], validation=0.0)
    assert len(TokenFiles(folder, 10)) == 1
    with pytest.raises(DataError, match="holds 11 tokens, fewer than one sequence of 11 and its last target"):
        TokenFiles(folder, 11)


def test_a_tokenizer_that_did_not_make_the_tokens_is_refused(folder: Path) -> None:
    path = folder / META
    path.write_text(path.read_text().replace(Numbers().fingerprint, "0123456789abcdef"))
    with pytest.raises(
        DataError, match=f"fingerprint {Numbers().fingerprint}, but the tokens were made by 0123456789abcdef"
    ):
        TokenFiles(folder, T)


# The loader


def test_an_exception_in_the_reading_thread_reaches_the_reader(folder: Path) -> None:
    class Failing(TokenFiles):
        def batch(self, start: int, count: int) -> Batch:
            if start >= 8:
                raise DataError("the disk is gone")
            return super().batch(start, count)

    with Loader(Failing(folder, T), 0, 4) as loader:
        next(loader)
        next(loader)
        with pytest.raises(DataError, match="the disk is gone"):
            next(loader)


def test_the_next_batches_are_made_while_one_is_used(folder: Path) -> None:
    seen: list[int] = []

    class Watched(TokenFiles):
        def batch(self, start: int, count: int) -> Batch:
            seen.append(start)
            return super().batch(start, count)

    with Loader(Watched(folder, T), 0, 4, ahead=3) as loader:
        next(loader)
        deadline = time.monotonic() + 10
        while len(seen) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert seen[:4] == [0, 4, 8, 12]
