"""Evaluations: measurements of a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field

from sky_core.slots import Eval


class LossEval(Eval):
    """Loss on the whole validation split: nats per token, perplexity and bits per byte."""

    kind: ClassVar = "loss"

    batch_tokens: Annotated[int, Field(ge=1, description="tokens per forward pass (at least one sequence)")] = 16384

    def build(self) -> Callable[..., dict[str, float]]:
        from sky_core.eval.loss import validation_loss

        return partial(validation_loss, batch_tokens=self.batch_tokens)
