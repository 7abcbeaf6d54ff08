"""The webdataset library reads our shards, and what it reads is what we read by offset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sky_core.components.tokenizer import Byte
from sky_core.data import shards
from sky_core.data.prepare import prepare
from sky_core.data.prepared import Meta
from sky_core.data.read import Corpus, Document
from sky_core.data.shards import DocumentShards, ShardTokens, write_document_shards

webdataset = pytest.importorskip("webdataset", reason="the extra 'webdataset' is not installed")


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> list[Document]:
    monkeypatch.setattr(shards, "MEMBER", 100)
    monkeypatch.setattr(shards, "SHARD", 4096)
    return [Document(f"d{i}", f"Document {i} über {i**5}. " * (i + 1), f"memory:{i}", "test") for i in range(40)]


def read(folder: Path, stem: str) -> list[dict[str, bytes]]:
    return list(webdataset.WebDataset([str(path) for path in sorted(folder.glob(f"{stem}-*.tar"))], shardshuffle=False))


def test_token_shards(tmp_path: Path, documents: list[Document]) -> None:
    out = tmp_path / "out"
    meta = prepare(documents, out, Byte(), validation=0.3, format="shards")
    for name, split in meta.splits.items():
        samples = read(out, name)
        assert len(split.files) > 1
        assert {len(sample["bin"]) // 2 for sample in samples[:-1]} == {100}
        theirs = np.concatenate([np.frombuffer(sample["bin"], "<u2") for sample in samples])
        ours = ShardTokens(out, Meta.read(out).splits[name], meta.dtype)
        assert np.array_equal(theirs, ours.read(0, len(ours)))
        assert np.array_equal(ours.gather(np.array([len(ours) - 3, 95]), 10), [np.roll(theirs, 3)[:10], theirs[95:105]])


def test_document_shards(tmp_path: Path, documents: list[Document]) -> None:
    out = tmp_path / "out"
    assert write_document_shards(documents, out).documents == 40
    samples = read(out, "documents")
    assert [sample["txt"].decode() for sample in samples] == [document.text for document in documents]
    ours = DocumentShards(out)
    assert [ours[i] for i in range(len(ours))] == documents
    assert ours[37] == documents[37]
    assert list(Corpus([out])) == documents
