"""Every bad input that the project promises to meet with one clear line: what, where, what to do; nothing is lost.

A row arranges a situation and returns the command to run in it. Other files test most of these in depth.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Situation = Callable[[Any], list[str]]

TRAIN = ["train", "run.yaml"]
ROWS: list[Any] = []


def row(code: int, *words: str, lines: int = 1) -> Callable[[Situation], Situation]:
    """The command of this situation exits with `code` and says `words`, in `lines` lines that begin with `sky: `."""

    def add(situation: Situation) -> Situation:
        ROWS.append(pytest.param(situation, code, words, lines, id=situation.__name__))
        return situation

    return add


def kept() -> dict[Path, bytes]:
    """Every file here, but for the two that a refused resume may write to: the log and the lock."""
    return {
        path: path.read_bytes()
        for path in Path().rglob("*")
        if path.is_file() and not path.is_symlink() and path.name not in ("log.txt", ".lock")
    }


# ------------------------------------------------------------------------------------------------------- run files


@row(2, "run.yaml:", "model.n_layers: unknown key; did you mean 'n_layer'?")
def unknown_key(lab: Any) -> list[str]:
    lab.write(model={"n_layers": 2})
    return TRAIN


@row(2, "command line: optimizer.learning_rate: unknown key; keys here: kind, lr, betas")
def unknown_key_on_the_command_line(lab: Any) -> list[str]:
    return [*TRAIN, "optimizer.learning_rate=1"]


@row(2, "run.yaml:", "train.steps: input should be a valid integer, got 'many'")
def wrong_type(lab: Any) -> list[str]:
    lab.write(train={"steps": "many"})
    return TRAIN


@row(2, "run.yaml:", "model.dropout: input should be less than", ", got 2")
def value_out_of_range(lab: Any) -> list[str]:
    lab.write(model={"dropout": 2})
    return TRAIN


@row(2, "optimizer: no optimizer called 'adam' (have: adamw, muon); did you mean 'adamw'?")
def unknown_component(lab: Any) -> list[str]:
    lab.write(optimizer={"kind": "adam"})
    return TRAIN


@row(2, "seed: input should be greater than", "train.clip:", "eval.evry: unknown key; did you mean 'every'?", lines=3)
def several_mistakes_at_once(lab: Any) -> list[str]:
    lab.write(seed=-1, train={"clip": -1}, eval={"evry": 2})
    return TRAIN


@row(2, "run.yaml:3: expected ',' or '}'")
def no_yaml(lab: Any) -> list[str]:
    Path("run.yaml").write_text("name: x\nmodel: {n_layer: 1\ndata: [\n")
    return TRAIN


@row(2, "run.yaml:3: the key 'seed' stands twice")
def a_key_twice(lab: Any) -> list[str]:
    Path("run.yaml").write_text("seed: 1\nname: x\nseed: 2\n")
    return TRAIN


# --------------------------------------------------------------------------------------------------------- plugins

OFFER = """
from typing import ClassVar
from sky_core import hookimpl, slots
sky_api = 2

class Mine(slots.Callback):
    "A callback."
    kind: ClassVar = "mine"
    def build(self, trainer): return object()

@hookimpl
def sky_callbacks(): return [Mine]
"""


def install(lab: Any, **sources: str) -> None:
    """Plugins as installed distributions would show them."""
    from sky_core import plugins

    points = []
    for name, source in sources.items():
        Path(f"plugin_{name}.py").write_text(source)
        lab.monkeypatch.delitem(sys.modules, f"plugin_{name}", raising=False)
        point = EntryPoint(name, f"plugin_{name}", "sky")
        points.append(point._for(SimpleNamespace(name=f"sky-{name}", version="0.1.0")))  # type: ignore[attr-defined]
    lab.monkeypatch.syspath_prepend(Path.cwd())
    lab.monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    lab.write(plugins=list(sources))


@row(2, "plugins: 'peft' is not installed (installed: none)")
def missing_plugin(lab: Any) -> list[str]:
    install(lab)
    lab.write(plugins=["peft"])
    return TRAIN


@row(2, "plugin 'mine' (sky-mine 0.1.0) failed to load: ModuleNotFoundError: No module named 'not_there'")
def plugin_that_fails_to_import(lab: Any) -> list[str]:
    install(lab, mine="import not_there\n")
    return TRAIN


@row(2, "plugin 'mine' (sky-mine 0.1.0) failed to load", "written for sky API 99", "upgrade sky-core")
def plugin_for_another_api_version(lab: Any) -> list[str]:
    install(lab, mine=OFFER.replace("sky_api = 2", "sky_api = 99"))
    return TRAIN


@row(2, "plugins 'mine' and 'yours' both offer the callback 'mine'", "leave one out with plugins:, or rename one")
def two_plugins_claiming_one_name(lab: Any) -> list[str]:
    install(lab, mine=OFFER, yours=OFFER)
    return TRAIN


@row(2, "plugin file", "gone.py")
def loose_file_that_raises(lab: Any) -> list[str]:
    Path("gone.py").write_text("raise OSError('the accelerator\\nis gone')\n")
    lab.write(plugins=["./gone.py"])
    return TRAIN


# ------------------------------------------------------------------------------------------------------------ data


@row(2, "the corpus is empty", "corpus.txt")
def empty_corpus(lab: Any) -> list[str]:
    Path("corpus.txt").write_text("")
    return TRAIN


@row(2, "texts", "the corpus is empty: no file below it ends in")
def folder_without_texts(lab: Any) -> list[str]:
    Path("texts").mkdir()
    return [*TRAIN, "data.path=texts"]


@row(2, "corpus.txt: a binary file (NUL byte at offset 2); only text can be read")
def binary_file(lab: Any) -> list[str]:
    Path("corpus.txt").write_bytes(b"\x7fE\0LF" * 100)
    return TRAIN


@row(2, "corpus.txt: invalid UTF-8 at byte offset 5; convert it first")
def invalid_utf8(lab: Any) -> list[str]:
    Path("corpus.txt").write_bytes(b"caf\xc3\xa9\xe9 " * 100)
    return TRAIN


@row(2, "corpus.tx: no such file or folder; did you mean 'corpus.txt'?")
def file_that_is_not_there(lab: Any) -> list[str]:
    return [*TRAIN, "data.path=corpus.tx"]


@row(2, "texts/b.txt: the file vanished while the corpus was read")
def file_that_vanishes(lab: Any) -> list[str]:
    from sky_core.data import read

    Path("texts").mkdir()
    for name in "ab":
        Path(f"texts/{name}.txt").write_text("some text\n" * 50)
    find = read._find

    def found_and_gone(path: str) -> Any:
        files = find(path)
        Path("texts/b.txt").unlink()
        return files

    lab.monkeypatch.setattr(read, "_find", found_and_gone)
    lab.loses = {Path("texts/b.txt")}
    return [*TRAIN, "data.path=texts"]


@row(2, "the training split holds", "fewer than one sequence of 16", "give more text or a smaller sequence_length")
def corpus_shorter_than_one_sequence(lab: Any) -> list[str]:
    Path("corpus.txt").write_text("short text")
    return TRAIN


def damaged(lab: Any, kind: str, pattern: str, damage: Callable[[bytes], bytes]) -> list[str]:
    """A run on prepared data, one file of which is damaged."""
    prepare = ["data", "prepare", "corpus.txt", "--out", "ready", "--tokenizer", "byte", "--split", "position"]
    assert lab.sky(*prepare, "--format", kind, "--workers", "1").code == 0
    file = next(Path("ready").glob(pattern))
    file.write_bytes(damage(file.read_bytes()))
    lab.table["data"] = {"kind": kind, "path": "ready", "sequence_length": 16}
    lab.write()
    return TRAIN


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@row(2, "ready/train.bin: truncated", "prepare the data again")
def truncated_token_file(lab: Any) -> list[str]:
    return damaged(lab, "tokens", "train.bin", half)


@row(2, "ready/train.bin: damaged", "SHA-256", "prepare the data again")
def bit_flipped_token_file(lab: Any) -> list[str]:
    return damaged(lab, "tokens", "train.bin", flipped)


@row(2, "ready/train-00000.tar: truncated", "prepare the data again")
def truncated_shard(lab: Any) -> list[str]:
    return damaged(lab, "shards", "train*.tar", half)


@row(2, "ready/train-00000.tar: damaged", "SHA-256", "prepare the data again")
def bit_flipped_shard(lab: Any) -> list[str]:
    return damaged(lab, "shards", "train*.tar", flipped)


@row(2, "ready was prepared with the tokenizer", "byte", "leave 'tokenizer:' out, or prepare the data with that one")
def data_of_another_tokenizer(lab: Any) -> list[str]:
    damaged(lab, "tokens", "train.bin", lambda content: content)
    return [*TRAIN, "tokenizer={kind: byte, end_of_text: false}"]


# ----------------------------------------------------------------------------------------------------- checkpoints


def stopped(lab: Any) -> Path:
    """A run of six steps that was stopped after the third."""
    with lab.during(3, lambda trainer: trainer.request_stop("enough")):
        return lab.train().directory  # type: ignore[no-any-return]


@row(1, "step_000003/model.safetensors: has", "bytes instead of", "use another checkpoint of this run (RUN@STEP)")
def truncated_checkpoint(lab: Any) -> list[str]:
    file = (run := stopped(lab)) / "checkpoints" / "last" / "model.safetensors"
    file.write_bytes(half(file.read_bytes()))
    return ["resume", str(run)]


@row(1, "step_000003/training/optimizer.safetensors: damaged (its sha256 differs)", "(RUN@STEP)")
def bit_flipped_checkpoint(lab: Any) -> list[str]:
    file = (run := stopped(lab)) / "checkpoints" / "last" / "training" / "optimizer.safetensors"
    file.write_bytes(flipped(file.read_bytes()))
    return ["resume", str(run)]


@row(1, "step_000003/model.safetensors: damaged", "(RUN@STEP)")
def sampling_from_a_damaged_checkpoint(lab: Any) -> list[str]:
    file = (run := stopped(lab)) / "checkpoints" / "last" / "model.safetensors"
    file.write_bytes(flipped(file.read_bytes()))
    return ["sample", str(run)]


@row(2, "step_000003: it was trained with tokenizer", "resume with the same tokenizer, or start a new run with init:")
def tokenizer_of_another_run(lab: Any) -> list[str]:
    return ["resume", str(stopped(lab)), "tokenizer={kind: byte, end_of_text: false}"]


@row(2, "init:", "was trained with tokenizer", "use the data and tokenizer that it was trained with")
def start_weights_of_another_tokenizer(lab: Any) -> list[str]:
    return [*TRAIN, f"init={stopped(lab)}", "tokenizer={kind: byte, end_of_text: false}"]


@row(2, "step_000003: it does not fit the model", "has shape (257, 16), the model has (257, 32)")
def another_model_shape(lab: Any) -> list[str]:
    return ["resume", str(stopped(lab)), "model.d_model=32"]


@row(2, "step_000003: it was trained with data", "resume with the same data, or start a new run with init:")
def other_data(lab: Any) -> list[str]:
    run = stopped(lab)
    Path("corpus.txt").write_text("another text altogether\n" * 99)
    return ["resume", str(run)]


@row(1, "step_000004: the checkpoint could not be written ([Errno 28] No space left on device)", "make room, then `sky")
def disk_full_while_saving(lab: Any) -> list[str]:
    from sky_core.training import checkpoint

    run = stopped(lab)

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lab.monkeypatch.setattr(checkpoint, "save_file", full)
    lab.goes_on = run
    return ["resume", str(run)]


@row(3, "step 5: 2 steps in a row had no finite loss", "resume from an earlier checkpoint with a lower optimizer.lr")
def nan_loss(lab: Any) -> list[str]:
    from sky_core.training.objective import Loss, NextToken

    run, forward = stopped(lab), NextToken.forward
    lab.monkeypatch.setattr(NextToken, "forward", lambda *given: Loss(forward(*given).total * math.nan))
    lab.goes_on = run
    return ["resume", str(run), "train.max_skipped=2"]


@row(2, "in use by process", "wait for it, or stop it with SIGTERM (it saves and exits)")
def run_in_use_by_a_live_process(lab: Any) -> list[str]:
    from sky_core.run_directory import RunDirectory

    run = stopped(lab)
    lab.held = RunDirectory(run).lock()
    return ["resume", str(run)]


@row(2, "step_000006: the run is complete (6 of 6 steps); `sky resume", "train.steps=...` makes it longer")
def complete_run(lab: Any) -> list[str]:
    return ["resume", str(lab.train().directory)]


@row(130, lines=0)
def sigint_during_a_save(lab: Any) -> list[str]:
    from sky_core.training import checkpoint

    run, save = stopped(lab), checkpoint.save_file

    def interrupted(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(*given)

    lab.monkeypatch.setattr(checkpoint, "save_file", interrupted)
    lab.goes_on = run
    return ["resume", str(run)]


# -------------------------------------------------------------------------------------------------------- sampling


@row(2, "prompt 0 has 40 tokens, more than the model's context of 16; shorten it")
def prompt_longer_than_the_context(lab: Any) -> list[str]:
    return ["sample", str(stopped(lab)), "--prompt", "a" * 40]


@row(2, "temperature", "got -1")
def sampling_option_out_of_range(lab: Any) -> list[str]:
    return ["sample", str(stopped(lab)), "--temperature", "-1"]


@row(2, "there is no checkpoint 'step_000009' (have: step_000002, step_000003)")
def checkpoint_that_is_not_there(lab: Any) -> list[str]:
    return ["sample", f"{stopped(lab)}@9"]


# -------------------------------------------------------------------------------------------------------- the test


@pytest.mark.parametrize(("situation", "code", "words", "lines"), ROWS)
def test_bad_input_is_told_in_one_line_and_costs_nothing(
    lab: Any, situation: Situation, code: int, words: tuple[str, ...], lines: int
) -> None:
    lab.loses, lab.goes_on, lab.held = set(), None, None
    straight = lab.tensors(lab.train("name=straight").directory) if situation is sigint_during_a_save else None
    patched: AbstractContextManager[pytest.MonkeyPatch] = pytest.MonkeyPatch.context()
    with patched as lab.monkeypatch:
        command = situation(lab)
        before = kept()
        told = lab.sky(*command)
    assert told.code == code
    assert len(told.errors) == lines
    assert told.out == "" or code == 130
    for word in words:
        assert word in "\n".join(told.errors)
    assert "Traceback" not in told.err
    assert "this is a bug" not in told.err
    after = kept()
    if lab.goes_on is None:
        assert {path for path, content in before.items() if after.get(path) != content} == lab.loses
    else:
        checkpoints = [path for path in before if "checkpoints" in path.parts]
        assert all(after.get(path) == before[path] for path in checkpoints if "step_000003" in path.parts)
        run = lab.resume(lab.goes_on)
        assert run.state == "done"
        assert straight is None or lab.tensors(run.directory) == straight
    if lab.held is not None:
        lab.held.close()
