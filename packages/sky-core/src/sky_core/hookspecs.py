"""Every hook of the project. A plugin implements any of them as module-level functions marked `@sky_core.hookimpl`.

Offer hooks are called once, when plugins are loaded and before the run file is read; they return iterables of
component classes and must not import torch. Event hooks are called a handful of times per run, never per step.
No hook is called inside a forward pass or the step loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sky_core import hookspec, slots

if TYPE_CHECKING:
    import click

    from sky_core.config import Run
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer
    from sky_core.training.trainer import Result, Trainer


class ModelSpecs:
    """Parts of a model."""

    @hookspec
    def sky_models(self) -> Iterable[type[slots.Model]]:
        """Whole architectures, for `model: {kind: ...}`."""

    @hookspec
    def sky_blocks(self) -> Iterable[type[slots.Block]]:
        """Residual wirings, for `model.block`."""

    @hookspec
    def sky_attention(self) -> Iterable[type[slots.Attention]]:
        """Attention layers, for `model.attention`."""

    @hookspec
    def sky_kernels(self) -> Iterable[type[slots.Kernel]]:
        """Kernels that compute softmax(QKᵀ)V under a mask, for `model.kernel`."""

    @hookspec
    def sky_feedforwards(self) -> Iterable[type[slots.FeedForward]]:
        """Position-wise layers, for `model.feedforward`."""

    @hookspec
    def sky_positions(self) -> Iterable[type[slots.Position]]:
        """Position encodings, for `model.position`."""

    @hookspec
    def sky_norms(self) -> Iterable[type[slots.Norm]]:
        """Normalisations, for `model.norm`."""

    @hookspec
    def sky_memories(self) -> Iterable[type[slots.Memory]]:
        """Memories with explicit state, for `model.memory`."""

    @hookspec
    def sky_adapters(self) -> Iterable[type[slots.Adapter]]:
        """Changes to a built model that live outside it, for `adapters`."""


class TokenizerSpecs:
    """Text to ids."""

    @hookspec
    def sky_tokenizers(self) -> Iterable[type[slots.Tokenizer]]:
        """Tokenizers, for `tokenizer` and `sky tokenizer train --kind`."""


class TrainerSpecs:
    """Parts of training, evaluation and sampling."""

    @hookspec
    def sky_datasets(self) -> Iterable[type[slots.Dataset]]:
        """Sources of sequences, for `data`."""

    @hookspec
    def sky_objectives(self) -> Iterable[type[slots.Objective]]:
        """Losses from (model, batch), for `objective`."""

    @hookspec
    def sky_optimizers(self) -> Iterable[type[slots.Optimizer]]:
        """Optimizers, for `optimizer`."""

    @hookspec
    def sky_schedules(self) -> Iterable[type[slots.Schedule]]:
        """Learning-rate schedules, for `schedule`."""

    @hookspec
    def sky_engines(self) -> Iterable[type[slots.Engine]]:
        """Engines (where and on how many processes a step runs), for `train.engine`."""

    @hookspec
    def sky_trainers(self) -> Iterable[type[slots.Trainer]]:
        """Training loops, for `train: {kind: ...}`."""

    @hookspec
    def sky_callbacks(self) -> Iterable[type[slots.Callback]]:
        """Observers of a run, for `callbacks`."""

    @hookspec
    def sky_evals(self) -> Iterable[type[slots.Eval]]:
        """Measurements of a model, for `eval.tasks`."""

    @hookspec
    def sky_samplers(self) -> Iterable[type[slots.Sampler]]:
        """Ways to choose the next token, for `sample.sampler`."""


class RunSpecs:
    """A plugin's own options and commands, and what happens to a run."""

    @hookspec
    def sky_sections(self) -> Iterable[type[slots.Section]]:
        """A plugin's own top-level table of the run file; its `kind` is the key."""

    @hookspec
    def sky_commands(self, app: click.Group) -> None:
        """Add sub-commands to `app`, the `sky` command; called when the command line starts. Must not import torch."""

    @hookspec
    def sky_configured(self, run: Run) -> None:
        """Called after a run file was read, before anything is built; raise `ConfigError` for cross-checks."""

    @hookspec(firstresult=True)
    def sky_load_model(self, source: str) -> tuple[LanguageModel, Tokenizer] | None:
        """Load `source` (`run:DIR`, `hf:DIR`, ...) or return None to leave it to the next plugin; the first answer
        counts."""

    @hookspec
    def sky_model_built(self, model: LanguageModel, run: Run) -> None:
        """Called when a run's model stands with its adapters attached: before it is trained, and before the weights of
        a checkpoint are loaded into it."""

    @hookspec
    def sky_trainer_built(self, trainer: Trainer, run: Run) -> None:
        """Called before the first step: the last chance to append to `trainer.callbacks`."""

    @hookspec
    def sky_finished(self, run: Run, result: Result) -> None:
        """Called on the main process when a run has ended, whatever its end was."""

    @hookspec
    def sky_doctor(self) -> Mapping[str, Any]:
        """Lines for `sky doctor`: what is available and in which version."""


SPECS = (ModelSpecs, TokenizerSpecs, TrainerSpecs, RunSpecs)
