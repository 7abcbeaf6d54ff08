"""`sky data`: results on stdout, progress on stderr, exit codes that say whose fault it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sky_core.cli.data import data
from sky_core.components.tokenizer import Bpe
from sky_core.data.tokens import TokenFiles
from sky_core.errors import CheckFailed, DataError, UserError


def sky(*arguments: Any) -> Result:
    return CliRunner().invoke(data, [str(argument) for argument in arguments])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text number {i}\n" * 9)
    return tmp_path / "texts"


def test_prepare_says_what_it_made_and_what_to_write_next(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    result = sky("prepare", texts, "--out", out, "--tokenizer", "byte", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "bytes per token" in result.stdout
    assert f"data: {{kind: tokens, path: {out}}}" in result.stdout
    assert "tokens: 1 documents" in result.stderr
    assert len(TokenFiles(out, 8)) > 0


def test_json_is_json(tmp_path: Path, texts: Path) -> None:
    result = sky("prepare", texts, "--out", tmp_path / "out", "--tokenizer", "byte", "--workers", 1, "--json")
    made = json.loads(result.stdout)
    assert made == json.loads(sky("show", tmp_path / "out", "--json").stdout)
    assert made["splits"]["train"]["documents"] + made["splits"]["validation"]["documents"] == 30


@pytest.mark.parametrize("format", ["tokens", "shards", "documents"])
def test_every_format_can_be_shown_and_verified(tmp_path: Path, texts: Path, format: str) -> None:
    out = tmp_path / "out"
    made = sky("prepare", texts, "--out", out, "--tokenizer", "byte", "--format", format, "--workers", 1)
    assert made.exit_code == 0, made.output
    assert format in sky("show", out).stdout
    assert "files as they were written" in sky("verify", out).stdout
    file = next(path for path in sorted(out.iterdir()) if path.suffix in (".bin", ".tar"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    failed = sky("verify", out)
    assert isinstance(failed.exception, CheckFailed)
    assert failed.exception.exit_code == 4
    assert file.name in str(failed.exception)


def test_text_shards_can_be_prepared_later(tmp_path: Path, texts: Path) -> None:
    sky("prepare", texts, "--out", tmp_path / "shards", "--format", "documents")
    for source, out in ((texts, "direct"), (tmp_path / "shards", "through_shards")):
        sky("prepare", source, "--out", tmp_path / out, "--tokenizer", "byte", "--workers", 1)
    for name in ("train.bin", "validation.bin", "meta.json"):
        direct, through = ((tmp_path / out / name).read_bytes() for out in ("direct", "through_shards"))
        assert direct == through
    with pytest.raises(DataError, match="holds documents, which do not fit here"):
        TokenFiles(tmp_path / "shards", 8)


def test_a_saved_tokenizer_is_used_as_it_is(tmp_path: Path, texts: Path) -> None:
    tokenizer = Bpe(vocab_size=260).train(["text number"])
    tokenizer.save(tmp_path / "tokenizer")
    sky("prepare", texts, "--out", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer", "--workers", 1)
    assert TokenFiles(tmp_path / "out", 8).tokenizer.fingerprint == tokenizer.fingerprint


def test_a_vocabulary_size_reaches_the_tokenizer(tmp_path: Path, texts: Path) -> None:
    sky("prepare", texts, "--out", tmp_path / "out", "--tokenizer", "bpe", "--vocab-size", 262, "--workers", 1)
    assert TokenFiles(tmp_path / "out", 8).tokenizer.vocab_size == 262


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "bqe"], "neither a kind .* nor a folder; did you mean 'bpe'"),
        (["--tokenizer", "byte", "--vocab-size", "300"], "byte: vocab_size: Extra inputs"),
        (["--tokenizer", "byte", "--validation", "1.5"], "a fraction of at least 0 and below 1 is needed"),
    ],
)
def test_wrong_options_are_the_users_mistake(tmp_path: Path, texts: Path, options: list[str], message: str) -> None:
    result = sky("prepare", texts, "--out", tmp_path / "out", *options)
    assert isinstance(result.exception, UserError)
    assert result.exception.exit_code == 2
    with pytest.raises(UserError, match=message):
        raise result.exception
