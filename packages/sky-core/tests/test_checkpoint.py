"""Checkpoints: complete or absent at every moment, verified when read, and never pickled."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sky_core.errors import CheckpointError, UserError
from sky_core.run_directory import RunDirectory
from sky_core.testing.workbench import tiny_tokenizer
from sky_core.training import checkpoint


def save(folder: Path, value: float = 1.0, **tensors: dict[str, torch.Tensor]) -> Path:
    """A small checkpoint whose every number is `value`."""
    checkpoint.save_checkpoint(
        folder,
        run_yaml="name: x\n",
        tokenizer=tiny_tokenizer(),
        tensors={"model": {"w": torch.full((3, 2), value)}, **tensors},
        state={"step": checkpoint.step_of(folder)},
    )
    return folder


# ------------------------------------------------------------------------------------------------ what is in one


def test_it_holds_what_was_given_and_nothing_is_pickled(lab: Any) -> None:
    run = lab.train("train.ema=0.9", "optimizer=muon").directory
    folder = run / "checkpoints" / "last"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "model.safetensors",
        "run.yaml",
        "tokenizer/tokenizer.json",
        "training/optimizer.safetensors",
        "training/ema.safetensors",
        "training/state.json",
        "MANIFEST.json",
    }
    for path in run.rglob("*"):
        if path.is_file():
            assert path.read_bytes()[:1] != b"\x80", f"{path} begins as a pickle does"
            assert not zipfile.is_zipfile(path), f"{path} is an archive as torch.save writes"


def test_tensors_come_back_bit_for_bit_whatever_their_shape_and_type(tmp_path: Path) -> None:
    given = {
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "low": torch.randn(3).bfloat16(),
        "extreme": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }
    folder = save(tmp_path / "step_000001", **{"training/optimizer": given})
    back = checkpoint.load_tensors(folder, "training/optimizer")
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(back[name].untyped_storage()) == bytes(tensor.contiguous().untyped_storage())
    assert checkpoint.load_tensors(folder, "training/nothing") == {}
    assert checkpoint.load_state(folder) == {"step": 1}


def test_keep_last_keep_best_and_their_links(lab: Any) -> None:
    def kept(**tables: Any) -> tuple[list[int], str, str | None]:
        lab.write(eval={"every": 1}, **tables)
        run = lab.train().directory
        links = [run / "checkpoints" / name for name in ("last", "best")]
        last, best = [os.readlink(link) if link.is_symlink() else None for link in links]
        return lab.steps(run), last or "", best

    losses = iter([5.0, 3.0, 4.0, 4.0, 4.0, 3.5] * 3)
    from sky_core.components.evaluation import LossEval

    lab.monkeypatch.setattr(LossEval, "build", lambda self: lambda *_: {"loss": next(losses)})
    assert kept(checkpoint={"every": 1, "keep_last": 2}) == ([2, 5, 6], "step_000006", "step_000002")
    assert kept(checkpoint={"every": 1, "keep_last": 1}) == ([2, 6], "step_000006", "step_000002")
    assert kept(checkpoint={"every": 3, "keep_best": False}) == ([3, 6], "step_000006", None)


# --------------------------------------------------------------------------------------------- damage is found


@pytest.fixture
def trained(lab: Any) -> Path:
    return lab.train("train.ema=0.9").directory / "checkpoints"  # type: ignore[no-any-return]


FILES = [
    "model.safetensors",
    "run.yaml",
    "tokenizer/tokenizer.json",
    "training/optimizer.safetensors",
    "training/ema.safetensors",
    "training/state.json",
    "MANIFEST.json",
]


@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_one_line_that_names_it_and_an_earlier_checkpoint_still_works(
    lab: Any, trained: Path, name: str
) -> None:
    file = trained / "step_000006" / name
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (flipped, content[:-9], content + b"x", b"", None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        for command in ("resume", "sample"):
            told = lab.sky(command, trained.parent)
            assert told.code == 1
            assert len(told.errors) == 1
            assert str(file) in told.errors[0]
            assert "use another checkpoint of this run (RUN@STEP)" in told.errors[0]
            assert "Traceback" not in told.err
        file.write_bytes(content)
    tensors = lab.tensors(trained.parent)
    file.write_bytes(flipped)
    assert lab.sky("sample", f"{trained.parent}@4", "--max-new-tokens", "2").code == 0
    assert lab.sky("resume", f"{trained.parent}@4").code == 0
    assert lab.tensors(trained.parent) == tensors


def test_every_single_bit_of_the_manifest_matters(tmp_path: Path) -> None:
    folder = save(tmp_path / "step_000001")
    file = folder / "MANIFEST.json"
    content = file.read_bytes()
    for position in range(len(content)):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        if content[position : position + 1].isspace():
            continue  # another kind of white space is the same manifest, or no JSON
        with pytest.raises(CheckpointError, match=r"MANIFEST\.json: damaged"):
            checkpoint.verify_checkpoint(folder)


def test_weights_of_another_shape_are_refused_with_what_differs() -> None:
    model = nn.Linear(2, 3)
    given = {"weight": torch.zeros(3, 4), "scale": torch.zeros(1)}
    with pytest.raises(UserError) as error:
        checkpoint.load_weights(model, given, Path("here"))
    assert str(error.value) == (
        "here: it does not fit the model: bias is missing; scale is not in the model;"
        " weight has shape (3, 4), the model has (3, 2); is `model:` the one it was trained with?"
    )


# ----------------------------------------------------------------------------------------- crashes and full disks


class Crash(BaseException):
    """The process is gone: no handler of ours runs."""


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException, *, dead: bool) -> Iterator[list[str]]:
    """Operation number `at` on the file system raises `error`, and if the process is dead every later one does.

    A failing write leaves half of its content behind.
    """
    done: list[str] = []

    def watched(name: str, function: Any) -> Any:
        def operation(*arguments: Any, **options: Any) -> Any:
            if name == "open" and "r" in (*arguments[1:], options.get("mode", "r"))[0] and "+" not in str(arguments):
                return function(*arguments, **options)
            done.append(name)
            if len(done) == at or (dead and len(done) > at):
                if len(done) == at and name == "save_file":
                    Path(arguments[1]).write_bytes(b"half")
                raise error
            return function(*arguments, **options)

        return operation

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "mkdir", "symlink", "unlink", "rmdir", "fsync"):
            patch.setattr(os, name, watched(name, getattr(os, name)))
        patch.setattr(Path, "open", watched("open", Path.open))
        patch.setattr(checkpoint, "save_file", watched("save_file", checkpoint.save_file))
        yield done


def usable(run: RunDirectory) -> int:
    """The step of the last checkpoint; every complete one is whole, and `last` and `best` lead to one."""
    for path in run.checkpoints:
        checkpoint.verify_checkpoint(path)
        assert torch.equal(
            checkpoint.load_tensors(path, "model")["w"], torch.full((3, 2), float(checkpoint.step_of(path)))
        )
    for which in ("last", "best"):
        link = run.path / "checkpoints" / which
        assert link.is_dir() or not link.is_symlink(), f"{which} leads nowhere"
    checkpoint.verify_checkpoint(run.checkpoint())
    return checkpoint.step_of(run.checkpoint("last"))


def prepared(folder: Path) -> RunDirectory:
    """A run with checkpoints of the steps 1 to 3; `best` is 1, one is kept beside `last` and `best`."""
    (folder / "checkpoints").mkdir(parents=True)
    for step in (1, 2, 3):
        save(folder / "checkpoints" / checkpoint.checkpoint_name(step), step)
    checkpoint.link_checkpoint(folder / "checkpoints" / "step_000003", "last")
    checkpoint.link_checkpoint(folder / "checkpoints" / "step_000001", "best")
    return RunDirectory(folder)


def one_save(run: RunDirectory) -> None:
    """What the trainer does when step 4 is a new best."""
    new = save(run.path / "checkpoints" / "step_000004", 4.0)
    checkpoint.link_checkpoint(new, "last")
    checkpoint.link_checkpoint(new, "best")
    checkpoint.prune_checkpoints(new.parent, run.checkpoints, 2)


def taken_up(run: RunDirectory) -> None:
    """What the trainer does when a run goes on from step 1."""
    checkpoint.remove_unfinished(run.path / "checkpoints")
    checkpoint.set_later_aside(run.path / "checkpoints" / "step_000001")


@pytest.mark.parametrize(
    ("work", "ends", "left"), [(one_save, {3, 4}, [3, 4]), (taken_up, {3, 1}, [1])], ids=["save", "take up"]
)
def test_a_crash_between_any_two_operations_leaves_a_readable_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Any, ends: set[int], left: list[int]
) -> None:
    prepared(tmp_path / "origin")
    seen: set[int] = set()
    for at in range(1, 200):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "origin", folder, symlinks=True)
        run = RunDirectory(folder)
        try:
            with failing(monkeypatch, at, Crash(), dead=True):
                work(run)
        except Crash:
            seen.add(usable(run))
            checkpoint.remove_unfinished(folder / "checkpoints")
            assert not list((folder / "checkpoints").glob(".tmp-*"))
            assert usable(run) in ends
        else:
            assert [checkpoint.step_of(path) for path in run.checkpoints] == left
            break
        shutil.rmtree(folder)
    assert seen == ends
    assert at > (15 if work is one_save else 5), "too few operations were seen"
    if work is taken_up:
        assert [path.name for path in sorted((folder / "checkpoints" / "set_aside").glob("*/step_*"))] == [
            "step_000002",
            "step_000003",
        ]


def test_a_disk_that_is_full_at_any_moment_costs_no_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path / "origin")
    refused: list[str] = []
    for at in range(1, 200):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "origin", folder, symlinks=True)
        run = RunDirectory(folder)
        try:
            with failing(monkeypatch, at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), dead=False):
                one_save(run)
        except CheckpointError as error:
            refused.append(str(error))
            if usable(run) == 3:
                assert not list((folder / "checkpoints").glob(".tmp-*")), "the space was not given back"
        except OSError:
            assert usable(run) in (3, 4)
        else:
            break
        shutil.rmtree(folder)
    assert len(refused) > 10
    for line in refused:
        assert "could not be written ([Errno 28] No space left on device); earlier checkpoints are untouched" in line


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(lab: Any, after: int) -> None:
    straight = lab.train("name=straight").directory
    real, calls = checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > after:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path)

    with lab.monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        told = lab.sky("train", "run.yaml")
    (run,) = Path("runs").glob("*_tiny-*")
    assert told.code == 1
    assert len(told.errors) == 1
    assert "could not be written ([Errno 28] No space left on device)" in told.errors[0]
    assert f"`sky resume {run}`" in told.errors[0]
    assert lab.steps(run) == [2, 4][: after // 2]
    assert lab.info(run)["state"] == "failed"
    assert lab.sky("resume", run).code == 0
    assert lab.tensors(run) == lab.tensors(straight)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "run.json", "model.safetensors"])
def test_a_disk_too_full_for_any_file_of_the_run_is_one_line_about_the_first(lab: Any, name: str) -> None:
    straight = lab.train("name=straight").directory
    from sky_core import run_directory
    from sky_core.training import metrics

    def full(what: str) -> Any:
        def refuse(*_: Any, **__: Any) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)

        return refuse

    with lab.monkeypatch.context() as patch:

        def fill(trainer: Any) -> None:
            places: dict[str, tuple[Any, str]] = {
                "metrics.jsonl": (metrics.MetricsLog, "log"),
                "events.jsonl": (run_directory, "append_json_line"),
                "model.safetensors": (checkpoint, "save_file"),
            }
            if name in places:
                patch.setattr(*places[name], full(name))
            patch.setattr(run_directory, "write_json", full("run.json"))

        with lab.during(3, fill):
            told = lab.sky("train", "run.yaml", "eval.every=null")
    (run,) = Path("runs").glob("*_tiny-*")
    assert told.code == 1
    assert len(told.errors) == 1
    assert f"No space left on device{': ' + repr(name) if name.startswith('model') else ''}" in told.errors[0]
    assert name in told.errors[0]
    assert f"`sky resume {run}`" in told.errors[0]
    assert lab.sky("resume", run, "eval.every=2").code == 0
    assert lab.tensors(run) == lab.tensors(straight)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs a system that limits other processes (Linux)")
def test_a_limit_set_by_the_kernel_is_met_like_a_full_disk(lab: Any, started: Any, wait_for: Any) -> None:
    """The real thing: what safetensors writes fails in the middle of the file."""
    lab.write(train={"steps": 100_000}, checkpoint={"every": 50}, eval={"every": None}, log={"every": 1000})
    process = started("train", "run.yaml")
    run = wait_for(lambda: next(iter(Path("runs").glob("*/checkpoints/last")), None)).parent.parent
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    process.join(60)
    assert process.exitcode == 1
    assert lab.info(run)["state"] == "failed"
    assert "could not be written" in lab.info(run)["reason"]
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert lab.sky("resume", run, f"train.steps={max(lab.steps(run)) + 1}").code == 0
