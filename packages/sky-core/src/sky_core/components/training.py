"""Core's objectives, engines, trainers and callbacks as run-file options. Torch-free."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from sky_core import slots
from sky_core.component import Slot

if TYPE_CHECKING:
    from sky_core.config import Run
    from sky_core.run_directory import RunDirectory
    from sky_core.tokenizer.base import Tokenizer
    from sky_core.training.callbacks import EarlyStop as BuiltEarlyStop
    from sky_core.training.engine import LocalEngine
    from sky_core.training.objective import MultiToken as BuiltMultiToken
    from sky_core.training.objective import NextToken as BuiltNextToken
    from sky_core.training.trainer import Trainer


log = logging.getLogger(__name__)

Recompute = Annotated[
    Literal["none", "selective", "block"],
    BeforeValidator(
        lambda given: {True: "block", False: "none"}[given] if isinstance(given, bool) else given,
        json_schema_input_type=Literal["none", "selective", "block"] | bool,
    ),
]
"""True and false are short for block and none."""


class NextToken(slots.Objective):
    """Predict the next token: the negative log-likelihood of every target, in nats."""

    kind: ClassVar = "next_token"
    paper: ClassVar = "Shannon 1951, Prediction and Entropy of Printed English"

    def build(self, run: Run, tokenizer: Tokenizer) -> BuiltNextToken:
        from sky_core.training.objective import NextToken as Built

        if getattr(run.model, "n_mtp", 0):
            log.warning("objective next_token leaves the model's n_mtp modules untrained; multi_token trains them")
        return Built()


class MultiToken(slots.Objective):
    """Predict the next token and, with the model's `n_mtp` modules, those after it."""

    kind: ClassVar = "multi_token"
    paper: ClassVar = "arXiv:2412.19437"

    weight: Annotated[
        float, Field(gt=0, description="of the mean loss of the further tokens beside the next one's")
    ] = 0.3

    def build(self, run: Run, tokenizer: Tokenizer) -> BuiltMultiToken:
        from sky_core.training.objective import MultiToken as Built

        return Built(self.weight)


class Local(slots.Engine):
    """One process on one device: CUDA where there is one, else the CPU."""

    kind: ClassVar = "local"

    def build(self) -> LocalEngine:
        from sky_core.training.engine import LocalEngine

        return LocalEngine()


class Fit(slots.Trainer):
    """Gradient descent for a number of steps, with evaluation, samples, checkpoints and exact resume."""

    kind: ClassVar = "fit"
    steps: Annotated[int, Field(ge=1, description="optimizer steps")]
    batch_tokens: Annotated[int, Field(ge=1, description="tokens per step, over all micro-batches and processes")]
    micro_batch: Annotated[
        int | None, Field(ge=1, description="sequences per forward pass and process; null: all of a step at once")
    ] = None
    clip: Annotated[float | None, Field(gt=0, description="largest global gradient norm; null: no clipping")] = 1.0
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp8"],
        Field(
            description="what forward and backward compute in; auto: bf16 where the processor multiplies it natively;"
            " fp8: bf16, with linear layers of blocks in 8 bits (Ada and Hopper GPUs or later)"
        ),
    ] = "auto"
    compile: Annotated[
        bool | Literal["operators"],
        Field(
            description="true: layers and loss with torch.compile (a minute or more once, then faster steps and less"
            " memory), and on a CPU the operators of sky_core.native; operators: these alone (half a minute once)"
        ),
    ] = False
    activation_checkpointing: Annotated[
        Recompute,
        Field(
            description="what the backward pass computes again instead of keeping it; selective: all but matrix"
            " products and attention, block: each layer whole"
        ),
    ] = "none"
    ema: Annotated[
        float | None,
        Field(gt=0, lt=1, description="decay of an average of the weights, which is then what is evaluated"),
    ] = None
    max_skipped: Annotated[
        int, Field(ge=1, description="non-finite steps in a row after which the run has diverged")
    ] = 10
    max_minutes: Annotated[float | None, Field(gt=0, description="stop (saved, resumable) after this long")] = None
    dry_run: Annotated[bool, Field(description="try one micro-batch first, to find out-of-memory at once")] = True
    engine: Annotated[
        Slot[slots.Engine, Literal["local"]], Field(description="where, and on how many processes, steps run")
    ] = Field(default={}, validate_default=True)

    def build(self, run: Run, directory: RunDirectory) -> Trainer:
        from sky_core.training.trainer import Trainer

        return Trainer(self, run, directory)


class EarlyStop(slots.Callback):
    """Stop when the validation loss has not fallen for some evaluations."""

    kind: ClassVar = "early_stop"
    paper: ClassVar = "Prechelt 1998, Early Stopping - But When?"
    patience: Annotated[int, Field(ge=1, description="evaluations without a new best before the run stops")] = 3
    min_delta: Annotated[float, Field(ge=0, description="nats by which a new best must be lower")] = 0.0

    def build(self, trainer: Any) -> BuiltEarlyStop:
        from sky_core.training.callbacks import EarlyStop as Built

        return Built(trainer, self.patience, self.min_delta)
