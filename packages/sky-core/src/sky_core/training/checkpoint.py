"""Checkpoints: one folder of safetensors, YAML and JSON, complete or absent.

    checkpoints/step_000500/
      model.safetensors  run.yaml  tokenizer/  (adapters.safetensors)
      training/          optimizer.safetensors, objective.safetensors, ema.safetensors, state.json
      MANIFEST.json      sha256 and size of every file, written last

A checkpoint is written under a temporary name, flushed file by file, then renamed, and never written a second time: a
crash or a full disk at any moment leaves the earlier checkpoints as they were. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sky_core.errors import CheckpointError, UserError
from sky_core.files import point_link, sha256, sync_file, sync_folder, write_atomic, write_json

if TYPE_CHECKING:
    from sky_core.tokenizer.base import Tokenizer

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

ANOTHER = "use another checkpoint of this run (RUN@STEP)"


def save_checkpoint(
    folder: Path, *, run_yaml: str, tokenizer: Tokenizer, tensors: dict[str, Tensors], state: dict[str, Any]
) -> None:
    """Write a checkpoint to `folder`, which must not exist yet, in one step.

    `tensors` maps a file stem ("model", "training/optimizer", ...) to its tensors; empty ones are left out. Raises
    `CheckpointError` when it cannot be written; nothing that existed before is touched then.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        (temporary / "training").mkdir(parents=True)
        for stem, named in tensors.items():
            if named:
                save_file(
                    {name: tensor.contiguous() for name, tensor in named.items()}, temporary / f"{stem}.safetensors"
                )
        write_atomic(temporary / "run.yaml", run_yaml)
        write_json(temporary / "training" / "state.json", state)
        tokenizer.save(temporary / "tokenizer")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        for path in files:
            sync_file(path)
        entries = {
            str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
        }
        write_json(temporary / "MANIFEST.json", {"files": entries, "sha256": _digest(entries)})
        sync_folder(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written ({error}); earlier checkpoints are untouched:"
            f" make room, then `sky resume {folder.parent.parent}`"
        ) from error


def _digest(entries: dict[str, Any]) -> str:
    """SHA-256 of a manifest's entries, so that damage to the manifest is not blamed on the files it names."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest. Raises `CheckpointError` naming the first file that differs."""
    manifest_file = folder / "MANIFEST.json"
    if not manifest_file.is_file():
        raise CheckpointError(f"{manifest_file}: missing, so this is no complete checkpoint; {ANOTHER}")
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        entries = manifest["files"]
        intact = manifest["sha256"] == _digest(entries)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{manifest_file}: damaged; {ANOTHER}")
    for name, expected in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; {ANOTHER}")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes instead of {expected['bytes']}; {ANOTHER}")
        if sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: damaged (its sha256 differs); {ANOTHER}")


def load_tensors(folder: Path, stem: str, device: torch.device | str = "cpu") -> Tensors:
    """The tensors of one file of a checkpoint; none when the file is absent."""
    path = folder / f"{stem}.safetensors"
    if not path.exists():
        return {}
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {ANOTHER}") from error


def load_state(folder: Path) -> dict[str, Any]:
    """The trainer's state (step, sequences consumed, best loss, ...)."""
    state: dict[str, Any] = json.loads((folder / "training" / "state.json").read_text(encoding="utf-8"))
    return state


def load_weights(module: torch.nn.Module, tensors: Tensors, source: Path) -> None:
    """Load `tensors` into `module`; names and shapes must match. Raises `UserError` naming what differs."""
    check_fit(module, tensors, source)
    module.load_state_dict(tensors)


def check_fit(module: torch.nn.Module, tensors: Tensors, source: Path) -> None:
    """Raise `UserError` naming what differs between the state of `module` and `tensors`, in names and shapes."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"{name} is missing" for name in own.keys() - given.keys()]
    problems += [f"{name} is not in the model" for name in given.keys() - own.keys()]
    problems += [
        f"{name} has shape {given[name]}, the model has {own[name]}"
        for name in own.keys() & given.keys()
        if own[name] != given[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{source}: it does not fit the model: {'; '.join(sorted(problems)[:3])}{more}; is `model:` the one it was"
            " trained with?"
        )


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def prune_checkpoints(folder: Path, checkpoints: list[Path], keep_last: int) -> None:
    """Delete all but the newest `keep_last` of `checkpoints` (by step) and those that `last` and `best` point to."""
    spared = {(folder / link).resolve() for link in ("last", "best") if (folder / link).is_symlink()}
    for path in checkpoints[:-keep_last]:
        if path.resolve() not in spared:
            _delete(path)


def set_later_aside(folder: Path) -> None:
    """Make `folder` the last checkpoint of its run: those of later steps, damaged ones too, go to `set_aside/`."""
    later = [path for path in folder.parent.glob("step_*") if step_of(path) > step_of(folder)]
    link_checkpoint(folder, "last")
    best = folder.parent / "best"
    if best.is_symlink() and best.resolve().name in {path.name for path in later}:
        best.unlink()
    if later:
        aside = folder.parent / "set_aside" / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        aside.mkdir(parents=True)
        for path in later:
            path.rename(aside / path.name)
        log.info("going on from %s; later checkpoints are now in %s", folder.name, aside)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint so that a crash leaves all of it or something `remove_unfinished` knows."""
    doomed = checkpoint.with_name(f".tmp-old-{checkpoint.name}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> None:
    """Delete what an interrupted save or deletion left behind."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def link_checkpoint(folder: Path, link: str) -> None:
    """Point `checkpoints/<link>` at `folder`."""
    point_link(folder.parent / link, folder.name)
