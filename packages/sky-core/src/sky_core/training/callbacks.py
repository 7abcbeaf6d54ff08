"""Callbacks that core offers. A callback has any of `on_start`, `on_step`, `on_eval`, `on_save`, `on_end`, and may keep
state over a resume with `state_dict` / `load_state_dict` (JSON values)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sky_core.errors import UserError

if TYPE_CHECKING:
    from sky_core.training.trainer import Trainer


class EarlyStop:
    """Ask the trainer to stop after `patience` evaluations whose loss is not `min_delta` below the best before."""

    def __init__(self, trainer: Trainer, patience: int, min_delta: float) -> None:
        self.trainer = trainer
        self.patience = patience
        self.min_delta = min_delta
        self.best = float("inf")
        self.waited = 0

    def on_eval(self, step: int, results: dict[str, float]) -> None:
        if "loss" not in results:
            raise UserError("callbacks: early_stop watches the validation loss; add `loss` to eval.tasks")
        if results["loss"] < self.best - self.min_delta:
            self.best, self.waited = results["loss"], 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.trainer.request_stop(f"no lower validation loss in {self.waited} evaluations", state="done")

    def state_dict(self) -> dict[str, Any]:
        return {"best": None if self.best == float("inf") else self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = float("inf") if state["best"] is None else state["best"]
        self.waited = state["waited"]
