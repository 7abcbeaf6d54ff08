"""The dataset components: what a run file writes, what is cached, and what they refuse."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from sky_core import slots
from sky_core.components import data
from sky_core.components.tokenizer import Bpe, Byte, Char, Saved
from sky_core.data.prepare import prepare
from sky_core.data.read import Corpus
from sky_core.data.tokens import TokenFiles
from sky_core.errors import DataError

LINES = "".join(f"The {i}th line says {i * i} and {i * i * i}.\n" for i in range(150))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(LINES)
    return path


def prepared(folder: Path, *, format: Any = "tokens", tokenizer: slots.Tokenizer | None = None) -> Path:
    """The lines as token files or shards below `folder`, once."""
    (folder / "text.txt").write_text(LINES)
    out = folder / format
    prepare(Corpus([folder / "text.txt"]), out, tokenizer or Byte(), split="position", format=format, reuse=True)
    return out


def test_text_is_prepared_once_and_says_so(text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    component = data.Text(path=str(text), sequence_length=8, split="position", cache=str(tmp_path / "cache"))
    first = component.build(0, Byte())
    assert "preparing" in caplog.text
    caplog.clear()
    again = component.build(0, Byte())
    assert "using the prepared text in" in caplog.text
    assert first.fingerprint == again.fingerprint
    assert component.build(0, None).tokenizer.kind == "char"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_cache_follows_the_content_and_the_options(text: Path, tmp_path: Path) -> None:
    def folder(tokenizer: slots.Tokenizer, **options: Any) -> Path:
        component = data.Text(path=str(text), sequence_length=8, cache=str(tmp_path / "cache"), **options)
        dataset = component.build(0, tokenizer)
        assert isinstance(dataset, TokenFiles)
        return dataset.folder

    folders = [
        folder(Byte(), split="position"),
        folder(Byte(end_of_text=False), split="position"),
        folder(Char(), split="position"),
        folder(Char(), split="position", validation=0.2),
    ]
    text.write_text(LINES + "more\n")
    folders.append(folder(Byte(), split="position"))
    assert len(set(folders)) == 5


def test_a_saved_tokenizer_that_changed_prepares_the_text_again(text: Path, tmp_path: Path) -> None:
    component = data.Text(path=str(text), sequence_length=8, split="position", cache=str(tmp_path / "cache"))
    saved = Saved(path=str(tmp_path / "tokenizer"))
    prints = []
    for vocab_size in (258, 260):
        Bpe(vocab_size=vocab_size).train([LINES]).save(tmp_path / "tokenizer")
        prints.append(component.build(0, saved).tokenizer.fingerprint)
    assert prints[0] != prints[1]


@pytest.mark.parametrize("asked", [Byte(), Bpe(vocab_size=300)])
def test_the_tokenizer_that_made_the_data_is_accepted(tmp_path: Path, asked: slots.Tokenizer) -> None:
    path = prepared(tmp_path, tokenizer=asked)
    dataset = data.Tokens(path=str(path), sequence_length=8).build(0, asked)
    dataset.tokenizer.save(tmp_path / "saved")
    data.Tokens(path=str(path), sequence_length=8).build(0, Saved(path=str(tmp_path / "saved")))


def test_the_tokenizer_of_another_run_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    path, here, other = prepared(tmp_path), Byte().train(()), Byte(end_of_text=False)
    component = data.Tokens(path=str(path), sequence_length=8)
    with pytest.raises(DataError, match=rf"{here.fingerprint}.*{other.train(()).fingerprint}.*leave 'tokenizer:' out"):
        component.build(0, other)
    Bpe(vocab_size=260).train([LINES]).save(tmp_path / "other")
    with pytest.raises(DataError, match="was prepared with the tokenizer"):
        component.build(0, Saved(path=str(tmp_path / "other")))
    with pytest.raises(DataError, match="unknown: not trained"):
        component.build(0, Bpe(vocab_size=300))


def test_a_path_that_was_not_prepared_suggests_to_prepare_it(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="make it with: sky data prepare"):
            data.Tokens(path=str(path), sequence_length=8).build(0, None)


def test_the_other_kind_of_storage_says_which_kind_to_write(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds shards; write 'kind: shards' instead of 'kind: tokens'"):
        data.Tokens(path=str(prepared(tmp_path, format="shards")), sequence_length=8).build(0, None)


def test_members_of_one_folder_are_read_in_different_orders(tmp_path: Path) -> None:
    member = data.Member(weight=1, data=data.Tokens(path=str(prepared(tmp_path)), sequence_length=8))
    rows = data.Mixture(members=[member, member]).build(0, None).batch(0, 8).tokens_BT.tolist()
    assert rows[0::2] != rows[1::2]
