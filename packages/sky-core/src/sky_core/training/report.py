"""What a run leaves for its reader: metric lines, events, samples, run.json, the display and the log file."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sky_core.compilation import Compilation
from sky_core.files import append_json_line, write_atomic
from sky_core.generation.text import generate
from sky_core.run_directory import utc_now
from sky_core.training.flops import measure_peak_flops, mfu
from sky_core.training.metrics import (
    MetricsLog,
    MetricsWriter,
    TensorBoardLog,
    Throughput,
    host_scalars,
    peak_memory,
    rewind,
)
from sky_core.training.progress import make_progress
from sky_core.yaml_file import dump_yaml

if TYPE_CHECKING:
    from sky_core.training.trainer import Result, Trainer

log = logging.getLogger(__name__)

REWOUND = ("metrics.jsonl", "events.jsonl", "samples.jsonl")


class Report:
    """The trainer's first callback. Reads the run, changes nothing in it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.folder = trainer.directory.path
        self.every = trainer.run.log.every
        self.progress = make_progress(trainer.fit.steps, quiet=not trainer.engine.is_main)
        self.writers: list[MetricsWriter] = []
        self.tokens = 0
        self.seconds = 0.0
        self.meter = Throughput(trainer.fit.steps)
        self.peak_flops: float | None = None
        self._waited = 0.0
        self._compiled = Compilation()
        self._last: dict[str, float] = {}
        self._started = time.monotonic()

    def rewind(self, step: int) -> None:
        """Forget what an earlier process reported of steps after `step`."""
        for name in REWOUND:
            if (self.folder / name).exists():
                rewind(self.folder / name, step)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds + time.monotonic() - self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.seconds = state["tokens"], state["seconds"]

    # ------------------------------------------------------------------------------------------------- events

    def on_start(self) -> None:
        trainer = self.trainer
        self._started = time.monotonic()
        if trainer.run.sample.every:  # a prompt that cannot be used shows now, not at the first sample
            generate(trainer.model, trainer.tokenizer, trainer.run.sample.prompts, max_new_tokens=0)
        write_atomic(self.folder / "config.yaml", dump_yaml(trainer.run.as_dict()))
        resume_from = trainer.step or None
        self.writers = [MetricsLog(self.folder / "metrics.jsonl")]
        if trainer.run.log.tensorboard:
            self.writers.append(TensorBoardLog(self.folder / "tensorboard", resume_from=resume_from))
        size = trainer.model.n_parameters()
        length = trainer.dataset.sequence_length
        self.flops_per_token = trainer.model.flops_per_token(length)
        log.info(
            "%s parameters (%s in the body), %s of training data a step",
            f"{size['total']:,}", f"{size['body']:,}", f"{trainer.fit.batch_tokens:,} tokens",
        )  # fmt: skip
        log.info("run %s", self.folder)
        trainer.directory.update(
            state="running", pid=os.getpid(), host=socket.gethostname(), heartbeat=round(time.time(), 1),
            started=utc_now(), parameters=size["total"], steps=trainer.fit.steps, reason="",
        )  # fmt: skip
        if resume_from:
            trainer.directory.append_event({"event": "resumed", "step": resume_from})
        self._compiled = Compilation.so_far()
        self.meter = Throughput(trainer.fit.steps, trainer.step)
        self.progress.start()

    def on_step(self, step: int, metrics: dict[str, Any]) -> None:
        waited = self.trainer.loader.waited
        self.tokens += int(metrics["tokens"])
        self.meter.count(metrics["tokens"], waited - self._waited)
        self._waited = waited
        self.meter.exclude(self._compilation(step))
        if not step % self.every or step in (1, self.trainer.fit.steps):
            self._log(step, metrics)
        if self.peak_flops is None:  # the first step of a process is slow: it is in no average, nor waits for this
            engine = self.trainer.engine
            self.peak_flops = measure_peak_flops(engine.device, "fp8" if engine.fp8 else engine.precision)
            log.info("matrix product at %.0f GFLOP/s", self.peak_flops / 1e9)
            self.meter = Throughput(self.trainer.fit.steps, step)

    def _compilation(self, step: int) -> float:
        """Seconds of compiling since the last call; whoever reads the run hears of them."""
        now = Compilation.so_far()
        new, self._compiled = now.since(self._compiled), now
        if new.seconds:
            log.info("step %d: %s", step, new)
            self.trainer.directory.append_event({"event": "compiled", "step": step, **new._asdict()})
        return new.seconds

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        values = host_scalars(metrics)
        values |= self.meter.read(step)
        if self.peak_flops is not None:
            values["mfu"] = mfu(values["tokens_per_second"], self.flops_per_token, self.peak_flops)
        for writer in self.writers:
            writer.log(step, values)
        self._last = values
        self.progress.update(step, values | peak_memory(self.trainer.engine.device))

    def on_eval(self, step: int, results: dict[str, float]) -> None:
        self._compilation(step)
        best = self.trainer.best_step == step
        self.trainer.directory.append_event({"event": "eval", "step": step, **results, "best": best})
        for writer in self.writers:
            writer.log(step, {f"validation_{name}": value for name, value in results.items()})
        self.trainer.directory.update(
            evaluation=results, best_loss=self.trainer.best_loss, best_step=self.trainer.best_step
        )
        self.progress.evaluation(step, results, best=best)

    def on_save(self, step: int, path: Path) -> None:
        self.trainer.directory.append_event({"event": "checkpoint", "step": step, "path": path.name})
        self._update()

    def sample(self) -> None:
        """Sample the run file's prompts with the model as it is; training does not notice."""
        trainer, wanted = self.trainer, self.trainer.run.sample
        for prompt in wanted.prompts:
            with trainer.engine.autocast():
                text = generate(
                    trainer.model, trainer.tokenizer, prompt,
                    max_new_tokens=wanted.max_new_tokens, sampler=wanted.sampler, seed=trainer.run.seed,
                )  # fmt: skip
            if trainer.engine.is_main:
                append_json_line(self.folder / "samples.jsonl", {"step": trainer.step, "prompt": prompt, "text": text})
            self.progress.sample(trainer.step, text, prompt)

    def on_end(self, result: Result) -> None:
        self.progress.stop()
        for writer in self.writers:
            writer.close()
        self._update(state=result.state, reason=result.reason, ended=utc_now())
        log.info("%s at step %d%s", result.state, result.step, f": {result.reason}" if result.reason else "")

    def heartbeat(self) -> None:
        """Say in run.json that the run is alive, and how far it is."""
        self._update(heartbeat=round(time.time(), 1))

    def _update(self, **fields: Any) -> None:
        seconds = self.seconds + time.monotonic() - self._started
        self.trainer.directory.update(
            step=self.trainer.step, tokens=self.tokens, minutes=round(seconds / 60, 2), skipped=self.trainer.skipped,
            tokens_per_second=self._last.get("tokens_per_second"), train_loss=self._last.get("loss"), **fields,
        )  # fmt: skip
