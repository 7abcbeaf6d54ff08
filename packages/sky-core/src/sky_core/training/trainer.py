"""The training loop: read it top to bottom.

Randomness is a pure function of (seed, step, process, micro-batch) and the data of (seed, position), so a run's whole
state is its weights, its optimizer and a few integers: resuming is exact, and evaluating or sampling more often
changes no training loss.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sky_core.data.loader import Loader
from sky_core.errors import Diverged, UserError
from sky_core.plugins import loaded_plugins
from sky_core.run_directory import HEARTBEAT_SECONDS, RunDirectory
from sky_core.training.build import build_model
from sky_core.training.engine import Step
from sky_core.training.report import Report
from sky_core.training.saver import Saver
from sky_core.training.signals import StopSignals

if TYPE_CHECKING:
    from sky_core.components.training import Fit
    from sky_core.config import Run
    from sky_core.data.dataset import Batch

log = logging.getLogger(__name__)

EVENTS = ("on_start", "on_step", "on_eval", "on_save", "on_end")


@dataclass
class Result:
    """How a run ended. `state` is done, stopped, diverged or failed; `evaluation` the last one's numbers."""

    directory: Path
    state: str
    step: int
    reason: str = ""
    evaluation: dict[str, float] = field(default_factory=dict)
    signal: str | None = None


def step_seed(seed: int, step: int, rank: int, micro: int) -> int:
    """A 63-bit seed for one forward pass (splitmix64 of the four numbers)."""
    value = 0
    for part in (seed, step, rank, micro):
        value = (value ^ part) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


class Trainer:
    """Gradient descent on one objective. Everything is built in `__init__`; `train` runs the loop."""

    def __init__(self, fit: Fit, run: Run, directory: RunDirectory) -> None:
        self.fit = fit
        self.run = run
        self.directory = directory
        self.step = 0
        self.sequences = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.best_loss = math.inf
        self.best_step: int | None = None
        self.evaluation: dict[str, float] = {}
        self._stop: tuple[str, str] | None = None

        self.engine = fit.engine.build()
        self.engine.setup(fit.precision, compile=fit.compile is True)
        self.dataset = run.data.build(run.seed, run.tokenizer)
        self.tokenizer = self.dataset.tokenizer
        self.model = build_model(run, self.tokenizer, fresh=not directory.checkpoints)
        self.model.activation_checkpointing = fit.activation_checkpointing
        if fit.compile and self.engine.device.type == "cpu":
            self.model.use_operators()
        elif fit.compile == "operators":
            log.info("train.compile: operators: there are none for %s", self.engine.device.type)
        torch.manual_seed(run.seed + 1)
        self.objective = run.objective.build(run, self.tokenizer)
        module = Step(self.model, self.objective).to(self.engine.device)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise UserError("nothing to train: every parameter is frozen")
        lr_scale = {f"model.{name}": factor for name, factor in self.model.lr_scale().items()}
        self.engine.prepare(module, partial(run.optimizer.build, lr_scale=lr_scale))
        self.peak_lr = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.engine.optimizers]
        self.schedule: Callable[[int], float] = run.schedule.build(fit.steps)
        self.module = module
        self.ema = self._build_ema()
        self.micro_batch, self.accumulation = self._split_batch()
        self.evals = [task.build() for task in run.eval.tasks]
        self.saver = Saver(self)
        self.report = Report(self)
        self.callbacks: list[Any] = [self.report, *(callback.build(self) for callback in run.callbacks)]
        if self.dataset.sequence_length > self.model.max_length:
            raise UserError(
                f"data: sequences of {self.dataset.sequence_length} tokens do not fit"
                f" model.max_length={self.model.max_length}; lower one or raise the other"
            )
        loaded_plugins().hook.sky_trainer_built(trainer=self, run=run)
        self._bound: dict[str, list[Callable[..., None]]] = {}
        self._after_step: list[Callable[..., dict[str, torch.Tensor]]] = []

    # ---------------------------------------------------------------------------------------------- the loop

    def train(self) -> Result:
        """Train to the end, or until something asks to stop; returns how it ended. Raises `Diverged`."""
        listeners = [callback for callback in self.callbacks if self.engine.is_main or callback is not self.report]
        self._bound = {
            event: [getattr(callback, event) for callback in listeners if hasattr(callback, event)] for event in EVENTS
        }
        self._after_step = [module.after_step for module in self.module.modules() if hasattr(module, "after_step")]
        started = beat = time.monotonic()
        with StopSignals(self.request_stop) as signals, ExitStack() as stack:
            try:
                self._announce("on_start")
                if self.fit.dry_run:
                    self._dry_run()
                self.loader = stack.enter_context(self._loader())
                while self.step < self.fit.steps and not self._stopped():
                    metrics = self._train_step(next(self.loader))
                    self._announce("on_step", self.step, metrics)
                    with self.report.meter.paused():
                        self._between_steps()
                    if self.engine.is_main and time.monotonic() - beat > HEARTBEAT_SECONDS:
                        beat = time.monotonic()
                        self.report.heartbeat()
                    if self.fit.max_minutes and time.monotonic() - started > self.fit.max_minutes * 60:
                        self.request_stop(f"max_minutes ({self.fit.max_minutes}) are over")
                if self.saver.saved_step != self.step:
                    self.save(best=False)
            except BaseException as error:
                self._fail(error)
                raise
            complete = self._stop is None or self.step == self.fit.steps
            state, reason = ("done", "") if complete or self._stop is None else self._stop
            result = Result(self.directory.path, state, self.step, reason, self.evaluation, signals.received)
            self._end(result)
        return result

    def _fail(self, error: BaseException) -> None:
        """Leave word of why the run ends; a disk that takes no word must not hide the error itself."""
        state = "diverged" if isinstance(error, Diverged) else "failed"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        try:
            self._end(Result(self.directory.path, state, self.step, reason, self.evaluation))
        except OSError as second:
            log.warning("%s", second)

    def _end(self, result: Result) -> None:
        self._announce("on_end", result)
        if self.engine.is_main:
            loaded_plugins().hook.sky_finished(run=self.run, result=result)

    def _loader(self) -> Loader:
        """This process's share of every step's sequences, from where the run stands."""
        share = self.micro_batch * self.accumulation
        return Loader(
            self.dataset,
            self.sequences + self.engine.rank * share,
            share,
            stride=share * self.engine.world_size,
            pinned=self.engine.device.type == "cuda",
        )

    def _train_step(self, sequences: Batch) -> dict[str, Any]:
        """One optimizer step over `accumulation` micro-batches; the metrics of that step as host numbers or tensors.

        The host waits for the device once, to learn whether the step is finite: until then it runs ahead.
        """
        batches = self._prepared(sequences)
        counts = [sum(self.objective.weight(batch) for batch in batches), sequences.n_targets()]
        weight, tokens = self.engine.totals(counts)
        weight = weight or 1.0  # a step without a target has no loss
        multiplier = self.schedule(self.step)
        for optimizer, peaks in zip(self.engine.optimizers, self.peak_lr, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * multiplier

        parts: dict[str, torch.Tensor] = {}
        for index, batch in enumerate(batches):
            torch.manual_seed(step_seed(self.run.seed, self.step, self.engine.rank, index))
            loss = self.engine.loss_of(batch, last=index == len(batches) - 1)
            self.engine.backward(loss.total / weight)
            for name, value in {"loss": loss.total.detach(), **loss.parts}.items():
                parts[name] = parts[name] + value if name in parts else value
        norm = self.engine.clip(self.fit.clip)
        means = {name: self.engine.sum(value) / weight for name, value in parts.items()}

        finite = bool(torch.isfinite(norm) & torch.isfinite(means["loss"]))
        self.engine.update(skip=not finite)
        for after_step in self._after_step:
            for name, value in after_step(self.engine.sum, skipped=not finite).items():
                means[name] = torch.maximum(means[name], value) if name in means else value
        if self.ema is not None and finite:
            self.ema.update()
        self.step += 1
        self.sequences += self.micro_batch * self.accumulation * self.engine.world_size
        self._count_skip(finite)
        return {
            **means,
            "grad_norm": norm,
            "lr": self.peak_lr[0][0] * multiplier,
            "tokens": tokens,
            "skipped": self.skipped,
        }

    def _prepared(self, batch: Batch) -> list[Batch]:
        """The step's sequences as micro-batches on the device, prepared by the objective."""
        prepared = []
        with torch.no_grad(), self.engine.autocast():
            for index in range(len(batch.tokens_BT) // self.micro_batch):
                # Another stream than that of the forward pass, so that rollouts and dropout are independent.
                torch.manual_seed(step_seed(self.run.seed, self.step, self.engine.rank, self.accumulation + index))
                part = batch.rows(index * self.micro_batch, (index + 1) * self.micro_batch)
                prepared.append(self.objective.prepare(self.model, part.to(self.engine.device)))
        return prepared

    def _count_skip(self, finite: bool) -> None:
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite:
            log.warning("step %d: loss or gradient is not finite; the step is skipped", self.step)
        if self.skipped_in_a_row >= self.fit.max_skipped:
            raise Diverged(
                f"step {self.step}: {self.skipped_in_a_row} steps in a row had no finite loss; resume from an earlier"
                " checkpoint with a lower optimizer.lr, or try train.precision=fp32"
            )

    # ----------------------------------------------------------------------------------------- between two steps

    def _between_steps(self) -> None:
        """Evaluate, save and sample where they are due: all of them at the end, but for samples."""
        at_end = self.step == self.fit.steps
        improved = (at_end or self._due(self.run.eval.every)) and self._evaluate()
        if improved or at_end or self._due(self.run.checkpoint.every):
            self.save(best=improved)
        if self._due(self.run.sample.every):
            self.report.sample()

    def _evaluate(self) -> bool:
        """Run every eval task; true when the loss is a new best and the best is to be kept."""
        with self.ema.swapped_in() if self.ema else nullcontext():
            results: dict[str, float] = {}
            for task in self.evals:
                results |= task(self.model, self.tokenizer, self.dataset, self.engine.autocast)
        self.evaluation = results
        improved = results.get("loss", math.inf) < self.best_loss
        if improved:
            self.best_loss, self.best_step = results["loss"], self.step
        self._announce("on_eval", self.step, results)
        return improved and self.run.checkpoint.keep_best

    def save(self, *, best: bool) -> Path:
        """Write a checkpoint of this moment (`Saver.save`)."""
        folder = self.saver.save(best=best)
        self._announce("on_save", self.step, folder)
        return folder

    def resume(self, folder: Path | None) -> None:
        """Continue from a checkpoint, exactly, or from nothing (`Saver.resume`)."""
        self.saver.resume(folder)
        if self.engine.is_main:
            self.report.rewind(self.step)

    # -------------------------------------------------------------------------------------------------- helpers

    def request_stop(self, reason: str, state: str = "stopped") -> None:
        """Stop after the current step; the run is saved and can be resumed."""
        self._stop = (state, reason)

    def _stopped(self) -> bool:
        """Whether this or another process was asked to stop: all of them leave the loop after the same step."""
        if self.engine.any(self._stop is not None) and self._stop is None:
            self.request_stop("another process of the run was asked to stop")
        return self._stop is not None

    def _announce(self, event: str, *arguments: Any) -> None:
        for function in self._bound[event]:
            function(*arguments)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _build_ema(self) -> Any:
        if self.fit.ema is None:
            return None
        from sky_core.training.ema import EMA

        return EMA(self.module, self.fit.ema)

    def _split_batch(self) -> tuple[int, int]:
        """(sequences per micro-batch, micro-batches per step) of one process."""
        length, world = self.dataset.sequence_length, self.engine.world_size
        sequences, rest = divmod(self.fit.batch_tokens, length * world)
        if sequences == 0 or rest:
            near = max(round(self.fit.batch_tokens / (length * world)), 1) * length * world
            raise UserError(
                f"train.batch_tokens: {self.fit.batch_tokens} is no multiple of {length} tokens x {world} processes;"
                f" {near} is the nearest"
            )
        micro = min(self.fit.micro_batch or sequences, sequences)
        if sequences % micro:
            raise UserError(
                f"train.micro_batch: {micro} does not divide the {sequences} sequences of a step (per process)"
            )
        return micro, sequences // micro

    def _dry_run(self) -> None:
        """Forward and backward on one micro-batch, undone: out-of-memory shows now, not in hour three."""
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        try:
            torch.manual_seed(self.run.seed)
            (batch,) = self._prepared(self.dataset.batch(self.sequences, self.micro_batch))
            loss = self.engine.loss_of(batch, last=True)
            self.engine.backward(loss.total * 0.0)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            raise UserError(
                f"out of memory with {self.micro_batch} sequences of {self.dataset.sequence_length} tokens at once;"
                " lower train.micro_batch (the result is the same), or set train.activation_checkpointing"
            ) from error
        self.engine.update(skip=True)
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])
