"""Run directories: what they hold, what state they are in, and how a run is named."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sky_core.config import read_run
from sky_core.errors import UserError
from sky_core.files import append_json_line, read_json_lines, write_atomic
from sky_core.run_directory import RunDirectory, environment, find_run, git_state, list_runs


@pytest.fixture(autouse=True)
def laboratory(lab: Any) -> None: ...


def made(name: str, **fields: Any) -> RunDirectory:
    directory = RunDirectory.create(read_run("run.yaml", [f"name={name}"]), config_input="as given\n")
    directory.update(**fields)
    return directory


def test_a_new_one_says_everything_that_a_result_needs_to_be_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path.cwd().parent))
    run = made("first", tags=["a"])
    assert (run.path / "config.input.yaml").read_text() == "as given\n"
    assert run.config == read_run("run.yaml", ["name=first"])
    assert (run.path / "command.txt").read_text().strip()
    facts = json.loads((run.path / "environment.json").read_text())
    assert facts["versions"]["torch"]
    assert facts["plugins"]["sky-core"]
    assert run.info["id"] == run.path.name
    assert run.state == "created"
    assert environment()["git"] is None, "the sandbox is no repository"


def test_the_state_of_the_source_is_kept() -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    Path("code.py").write_text("x = 1\n")
    git("add", "code.py")
    git("commit", "-qm", "x")
    clean = git_state(Path.cwd())
    assert clean is not None
    assert clean["dirty_patch"] == ""
    Path("code.py").write_text("x = 2\n")
    dirty = git_state(Path.cwd())
    assert dirty is not None
    assert dirty["commit"] == clean["commit"]
    assert "+x = 2" in dirty["dirty_patch"]


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"state": "done"}, "done"),
        ({"state": "running", "pid": os.getpid(), "heartbeat": 0}, "running"),
        ({"state": "running", "pid": 2**22 + 1}, "crashed"),
        ({"state": "created", "pid": 2**22 + 1}, "crashed"),
        ({"state": "running", "pid": 1, "host": "elsewhere", "heartbeat": 0}, "crashed"),
        ({"state": "running", "pid": 1, "host": "elsewhere", "heartbeat": 9e12}, "running"),
    ],
)
def test_a_run_whose_process_is_gone_has_crashed(fields: dict[str, Any], state: str) -> None:
    assert made("x", **({"host": socket.gethostname()} | fields)).state == state


def test_one_process_at_a_time() -> None:
    run = made("x")
    with run.lock(), pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*SIGTERM"):
        run.lock()
    with run.lock() as again:
        assert not again.closed


def test_find_by_directory_id_name_prefix_and_by_last_and_best() -> None:
    first = made("alpha-one", best_loss=2.0)
    second = made("alpha-two", best_loss=1.0)
    third = made("beta", best_loss=None)
    for source, run, which in [
        (str(first.path), first, "last"),
        (f"{first.path}/", first, "last"),
        (f"{first.path}@12", first, "step_000012"),
        (first.path.name, first, "last"),
        ("alpha-one", first, "last"),
        ("alpha-t", second, "last"),
        ("beta@best", third, "best"),
        ("beta@last", third, "last"),
        ("beta@1500", third, "step_001500"),
        ("@last", list_runs()[-1], "last"),
        ("@last@7", list_runs()[-1], "step_000007"),
        ("@best", second, "best"),
        ("@best@last", second, "last"),
    ]:
        found, checkpoint = find_run(source)
        assert (found.path.resolve(), checkpoint) == (run.path.resolve(), which), source


def test_a_name_is_found_before_a_longer_one_that_begins_with_it() -> None:
    made("run-2")
    assert find_run("run-2")[0].info["name"] == "run-2"
    made("run-20")
    assert find_run("run-2")[0].info["name"] == "run-2"


def test_a_folder_with_an_at_in_its_name_is_a_folder() -> None:
    run = made("x")
    moved = Path("a@b") / run.path.name
    moved.parent.mkdir()
    run.path.rename(moved)
    assert find_run(str(moved))[0].path == moved


def test_a_source_that_names_nothing_says_what_there_is() -> None:
    with pytest.raises(UserError, match=r"'nothing': no such directory, and there are no runs in runs/"):
        find_run("nothing")
    one, two = made("alpha-one"), made("alpha-two")
    with pytest.raises(UserError) as error:
        find_run("alpha")
    assert str(error.value).startswith("'alpha' is ambiguous: ")
    assert one.path.name in str(error.value)
    assert two.path.name in str(error.value)
    with pytest.raises(UserError, match=r"no run called 'alpa-one' in runs/; did you mean 'alpha-one'\?"):
        find_run("alpa-one")
    with pytest.raises(UserError, match=r"after @ stands a step, 'last' or 'best', not 'first'"):
        find_run("alpha-one@first")
    with pytest.raises(UserError, match=r"no run in runs/ was evaluated yet"):
        find_run("@best")
    Path("texts").mkdir()
    with pytest.raises(UserError, match=r"texts: this is no run directory \(it has no run.json\)"):
        find_run("texts")


def test_a_checkpoint_by_its_name() -> None:
    run = made("x")
    with pytest.raises(UserError, match=r"there is no checkpoint 'last' \(have: none yet\)"):
        run.checkpoint()
    for step in (2, 4):
        folder = run.path / "checkpoints" / f"step_00000{step}"
        folder.mkdir()
        (folder / "MANIFEST.json").touch()
    assert run.checkpoint().name == "step_000004", "the process died before it set the link"
    (run.path / "checkpoints" / "last").symlink_to("step_000002")
    assert run.checkpoint() == run.path / "checkpoints" / "step_000002"
    assert run.checkpoint("step_000004").name == "step_000004"
    with pytest.raises(UserError, match=r"no checkpoint 'best' \(have: step_000002, step_000004\)"):
        run.checkpoint("best")


def test_a_torn_last_line_is_left_out_and_numbers_that_are_none_become_null(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    append_json_line(file, {"a": float("nan"), "b": [1, float("inf")], "é": None})
    assert file.read_text(encoding="utf-8") == '{"a": null, "b": [1, null], "é": null}\n'
    with file.open("a") as stream:
        stream.write('{"a": 1')
    assert list(read_json_lines(file)) == [{"a": None, "b": [1, None], "é": None}]
    assert list(read_json_lines(tmp_path / "nothing")) == []


def test_a_file_is_replaced_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    write_atomic(file, "first")
    with file.open() as reader:
        write_atomic(file, "old")
        assert reader.read() == "first", "who was reading sees the file change"

    def crash(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(file, "new and longer")
    assert file.read_text() == "old"


def test_a_repository_whose_changes_are_no_utf8_is_still_described(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "notes.txt").write_bytes(b"plain\n")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "notes.txt").write_bytes(b"caf\xe9\n")
    state = git_state(tmp_path)
    assert state is not None
    assert "caf\ufffd" in state["dirty_patch"]
