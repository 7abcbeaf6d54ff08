"""What a run keeps to go on exactly: weights, optimizer state, averages, a few integers, its callbacks' states."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sky_core.errors import UserError
from sky_core.plugins import loaded_plugins
from sky_core.training import checkpoint
from sky_core.yaml_file import dump_yaml

if TYPE_CHECKING:
    from sky_core.training.trainer import Trainer

log = logging.getLogger(__name__)

PARTS = {"model.": "model", "adapters.": "adapters", "objective.": "training/objective"}
"""Prefix of names in the state of a step -> file stem in a checkpoint."""

COUNTERS = ("step", "sequences", "skipped", "skipped_in_a_row", "best_step", "evaluation")
"""Attributes of the trainer that a checkpoint keeps as they are."""


class Saver:
    """Writes a trainer's checkpoints and continues from them."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.folder = trainer.directory.path / "checkpoints"
        self.saved_step: int | None = None

    def save(self, *, best: bool) -> Path:
        """Write a checkpoint of this moment, point `last` (and `best`) at it, delete what is not to be kept."""
        trainer = self.trainer
        folder = self.folder / checkpoint.checkpoint_name(trainer.step)
        state = trainer.engine.state()
        tensors = {
            **{
                stem: {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
                for part, stem in PARTS.items()
            },
            "training/optimizer": trainer.engine.optimizer_state(),
            "training/ema": trainer.ema.state_dict() if trainer.ema else {},
        }
        if trainer.engine.is_main:
            checkpoint.save_checkpoint(
                folder,
                run_yaml=dump_yaml(trainer.run.as_dict()),
                tokenizer=trainer.tokenizer,
                tensors=tensors,
                state=self._state(),
            )
            checkpoint.link_checkpoint(folder, "last")
            if best:
                checkpoint.link_checkpoint(folder, "best")
            checkpoint.prune_checkpoints(self.folder, trainer.directory.checkpoints, trainer.run.checkpoint.keep_last)
        self.saved_step = trainer.step
        return folder

    def resume(self, folder: Path | None) -> None:
        """Continue from a checkpoint, or from nothing: what an earlier process left unfinished is removed, and
        checkpoints of later steps are set aside.

        Raises `CheckpointError` or `UserError` when the checkpoint does not fit; nothing on disk is changed then.
        """
        if folder is not None:
            self._load(folder)
        if self.trainer.engine.is_main:
            checkpoint.remove_unfinished(self.folder)
        if folder is not None:
            if self.trainer.engine.is_main:
                checkpoint.set_later_aside(folder)
            self._restore_best(folder)
            self.saved_step = self.trainer.step

    def _state(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            **{name: getattr(trainer, name) for name in COUNTERS},
            "best_loss": None if math.isinf(trainer.best_loss) else trainer.best_loss,
            **self._made_with(),
            "versions": loaded_plugins().versions(),
            "callbacks": {name: callback.state_dict() for name, callback in self._keepers().items()},
        }

    def _made_with(self) -> dict[str, str]:
        """What must be the same when the run goes on."""
        trainer = self.trainer
        return {
            "tokenizer": trainer.tokenizer.fingerprint,
            "data": trainer.dataset.fingerprint,
            "optimizer": trainer.run.optimizer.kind,
        }

    def _keepers(self) -> dict[str, Any]:
        """The callbacks that keep state over a resume, by class and number."""
        keepers: dict[str, Any] = {}
        for callback in self.trainer.callbacks:
            if hasattr(callback, "state_dict"):
                name = type(callback).__name__
                keepers[f"{name}.{sum(key.startswith(f'{name}.') for key in keepers)}"] = callback
        return keepers

    def _load(self, folder: Path) -> None:
        trainer = self.trainer
        checkpoint.verify_checkpoint(folder)
        state = checkpoint.load_state(folder)
        for what, value in self._made_with().items():
            if state[what] != value:
                raise UserError(
                    f"{folder}: it was trained with {what} {state[what]}, this run has {value}; resume with the same"
                    f" {what}, or start a new run with init:"
                )
        if state["step"] >= trainer.fit.steps:
            if trainer.directory.state == "crashed":
                trainer.directory.update(state="done", step=state["step"])
            raise UserError(
                f"{folder}: the run is complete ({state['step']} of {trainer.fit.steps} steps);"
                f" `sky resume {trainer.directory.path} train.steps=...` makes it longer"
            )
        changed = {n: v for n, v in state["versions"].items() if loaded_plugins().versions().get(n) != v}
        if changed:
            log.warning("resuming under other versions; the checkpoint was written with %s", changed)
        tensors = {
            f"{part}{name}": tensor
            for part, stem in PARTS.items()
            for name, tensor in checkpoint.load_tensors(folder, stem).items()
        }
        checkpoint.check_fit(trainer.module, tensors, folder)
        trainer.engine.load_state(tensors)
        trainer.engine.load_optimizer_state(checkpoint.load_tensors(folder, "training/optimizer"))
        if trainer.ema is not None:
            averages = checkpoint.load_tensors(folder, "training/ema")
            if not averages:
                raise UserError(f"train.ema: {folder} holds no averaged weights; resume without train.ema")
            trainer.ema.load_state_dict(averages)
        for name in COUNTERS:
            setattr(trainer, name, state[name])
        trainer.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        for name, callback in self._keepers().items():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])

    def _restore_best(self, folder: Path) -> None:
        """The link `best` as it was at this step; where that checkpoint is gone, the next evaluation is the best."""
        trainer = self.trainer
        if not trainer.run.checkpoint.keep_best or trainer.best_step is None:
            return
        best = folder.with_name(checkpoint.checkpoint_name(trainer.best_step))
        if best.exists():
            checkpoint.link_checkpoint(best, "best")
        else:
            trainer.best_loss, trainer.best_step = math.inf, None
