"""`sky sample`: text on stdout, as asked."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sky_core import api
from sky_core.cli.sample import sample
from sky_core.errors import UserError
from sky_core.generation import drafts
from sky_core.generation.text import generate
from sky_core.model.cache import Cache
from sky_core.model.language_model import LanguageModel
from sky_core.tokenizer.byte import ByteTokenizer
from sky_core.training import precision

BYTES = ByteTokenizer()


@pytest.fixture(autouse=True)
def a_run(monkeypatch: pytest.MonkeyPatch, tiny_model: LanguageModel) -> None:
    monkeypatch.setattr(api, "load", lambda source: (tiny_model, BYTES))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(sample, ["a-run", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_stream_and_the_whole_are_the_prompt_and_its_continuation(tiny_model: LanguageModel) -> None:
    text = generate(tiny_model, BYTES, "to be", max_new_tokens=20, seed=3)
    for flags in ([], ["--no-stream"]):
        assert run("--prompt", "to be", "--max-new-tokens", "20", "--seed", "3", *flags) == f"to be{text}\n"


def test_options_reach_the_sampler(tiny_model: LanguageModel) -> None:
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    flags = [flag for name, value in options.items() for flag in (f"--{name.replace('_', '-')}", str(value))]
    text = generate(tiny_model, BYTES, "a", max_new_tokens=20, stop=["e", "zz"], **options)
    assert run("--prompt", "a", "--max-new-tokens", "20", *flags, "--stop", "e", "--stop", "zz") == f"a{text}\n"


def test_json_holds_every_sample_of_every_prompt(tiny_model: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("é\n", encoding="utf-8")
    arguments = ["--prompt", "a", "--prompt-file", str(file), "--n", "2", "--max-new-tokens", "5", "--json"]
    records = json.loads(run(*arguments))
    assert [record["prompt"] for record in records] == ["a", "a", "é\n", "é\n"]
    assert [record["text"] for record in records] == generate(
        tiny_model, BYTES, ["a", "a", "é\n", "é\n"], max_new_tokens=5
    )
    assert records[0].keys() == {"prompt", "text", "tokens", "logprobs", "finish", "proposed", "accepted", "error"}
    assert records[0]["finish"] == "length"


@pytest.mark.parametrize("flags", [["lookup"], ["other", "--draft-tokens", "2"]])
def test_a_draft_gives_the_same_greedy_text(
    tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setattr(drafts, "load", lambda source: (tiny_model, BYTES))
    arguments = ["--prompt", "to be", "--temperature", "0", "--max-new-tokens", "20", "--json"]
    [plain], [drafted] = json.loads(run(*arguments)), json.loads(run(*arguments, "--draft", *flags))
    assert drafted["tokens"] == plain["tokens"]
    assert plain["proposed"] == 0 < drafted["proposed"]


def test_a_draft_that_cannot_serve_is_refused() -> None:
    with pytest.raises(UserError, match="no modules of multi-token prediction"):
        run("--prompt", "a", "--draft", "mtp")


def test_a_draft_and_compiling_are_not_had_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load", lambda source: pytest.fail("loaded"))
    result = CliRunner().invoke(sample, ["a-run", "--compile", "--draft", "lookup"])
    assert result.exit_code == 2
    assert "--compile compiles steps of one token" in result.stderr


@pytest.mark.parametrize(
    ("flags", "hardware", "dtype"),
    [
        ([], "AMX", torch.float32),
        (["--precision", "bf16"], None, torch.bfloat16),
        (["--precision", "auto"], "AMX", torch.bfloat16),
        (["--precision", "auto"], None, torch.float32),
        (["--precision", "bf16", "--quantize", "int8"], None, torch.bfloat16),
        (["--precision", "bf16", "--draft", "lookup"], None, torch.bfloat16),
        (["--precision", "bf16", "--draft", "other"], None, torch.bfloat16),
    ],
    ids=str,
)
def test_the_precision_is_that_of_weights_and_cache(
    tiny_model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flags: list[str],
    hardware: str | None,
    dtype: torch.dtype,
) -> None:
    model, seen = copy.deepcopy(tiny_model), set[torch.dtype]()
    monkeypatch.setattr(api, "load", lambda source: (model, BYTES))
    monkeypatch.setattr(drafts, "load", lambda source: (tiny_model, BYTES))
    monkeypatch.setattr(precision, "bf16_hardware", lambda *device: hardware)
    new_cache = model.new_cache

    def seeing(*arguments: int) -> Cache:
        cache = new_cache(*arguments)
        seen.update(tensor.dtype for tensor in cache.tensors())
        return cache

    monkeypatch.setattr(model, "new_cache", seeing)
    with caplog.at_level(logging.INFO, logger=precision.log.name):
        text = run("--prompt", "to be", "--max-new-tokens", "8", *flags)
    assert text.startswith("to be")
    assert seen == {dtype}
    assert sum("precision" in message for message in caplog.messages) == bool(flags)


def test_several_samples_are_told_apart() -> None:
    first, second = run("--prompt", "a", "--n", "2", "--max-new-tokens", "4").split("-" * 20 + "\n")
    assert first.startswith("a")
    assert second.startswith("a")
    assert first != second


def test_without_a_prompt_a_document_begins(tiny_model: LanguageModel) -> None:
    assert run("--max-new-tokens", "6") == generate(tiny_model, BYTES, "", max_new_tokens=6) + "\n"


def test_a_prompt_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "binary"
    file.write_bytes(b"ok\xff")
    with pytest.raises(UserError, match=r"binary: not UTF-8 text \(byte 2\)"):
        run("--prompt-file", str(file))


def test_an_option_out_of_range_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load", lambda source: pytest.fail("loaded"))
    with pytest.raises(UserError, match="top_p"):
        run("--top-p", "3")


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_printed() -> None:
    result = CliRunner().invoke(sample, ["a-run", "--prompt", "a" * 65])
    assert isinstance(result.exception, UserError)
    assert "65 tokens" in str(result.exception)
    assert result.stdout == ""
