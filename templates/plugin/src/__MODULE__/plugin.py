"""What __DIST__ offers. Torch-free: what a component builds is imported when it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sky_core import hookimpl
from sky_core.slots import FeedForward, LayerSpec

if TYPE_CHECKING:
    from torch import nn

sky_api = 2


class Gated(FeedForward):
    """A gated linear unit with a GELU (Shazeer 2020, equation 5): the docstring is the help."""

    kind: ClassVar = "__KIND__"
    paper: ClassVar = "arXiv:2002.05202"

    d_ff: Annotated[int | None, Field(ge=1, description="hidden units; null: 8/3 d_model")] = None

    def build(self, spec: LayerSpec) -> nn.Module:
        from __MODULE__.feedforward import GatedFeedForward

        return GatedFeedForward(spec, self.d_ff or 8 * spec.d_model // 3)


@hookimpl
def sky_feedforwards() -> list[type[FeedForward]]:
    return [Gated]
