"""Samplers: how the next token is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sky_core.slots import Sampler

if TYPE_CHECKING:
    import torch


class Greedy(Sampler):
    """The most probable token, always."""

    kind: ClassVar = "greedy"

    def build(self) -> Callable[..., torch.Tensor]:
        from sky_core.generation.sampling import TokenSampler

        return TokenSampler(temperature=0)


class Sample(Sampler):
    """A draw after repetition penalty, temperature, top-k, top-p and min-p, in this order; each may be left out.

    Temperature 0 takes the most probable token.
    """

    kind: ClassVar = "sample"
    paper: ClassVar = "arXiv:1904.09751, arXiv:2407.01082, arXiv:1909.05858"

    temperature: Annotated[float, Field(ge=0, description="below 1 sharpens the distribution, 0 is greedy")] = 0.8
    top_k: Annotated[int | None, Field(ge=1, description="keep the k most probable tokens")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1, description="keep the smallest set with this probability")] = None
    min_p: Annotated[
        float | None, Field(ge=0, le=1, description="keep tokens this many times as probable as the most probable")
    ] = None
    repetition_penalty: Annotated[
        float, Field(gt=0, description="above 1 makes tokens of the prompt and the text so far less probable")
    ] = 1.0

    def build(self) -> Callable[..., torch.Tensor]:
        from sky_core.generation.sampling import TokenSampler

        return TokenSampler(**self.model_dump())
