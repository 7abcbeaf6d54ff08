"""What sky-demo offers. Torch-free: what a component builds is imported when it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sky_core import hookimpl
from sky_core.slots import Attention, AttentionSpec, Objective

if TYPE_CHECKING:
    import click

    from sky_core.config import Run
    from sky_core.tokenizer.base import Tokenizer
    from sky_demo.linear_attention import LinearAttention
    from sky_demo.z_loss import ZLossObjective

sky_api = 2


class Linear(Attention):
    """Attention without softmax: its cost grows linearly with the length, its cache not at all."""

    kind: ClassVar = "linear"
    paper: ClassVar = "arXiv:2006.16236"

    chunk: Annotated[int, Field(ge=1, description="tokens that are computed side by side; the state goes between")] = 64

    def build(self, spec: AttentionSpec) -> LinearAttention:
        from sky_demo.linear_attention import LinearAttention

        return LinearAttention(spec, self.chunk)


class ZLoss(Objective):
    """Next-token prediction that also keeps the softmax normaliser near 1, against drifting logits."""

    kind: ClassVar = "z_loss"
    paper: ClassVar = "arXiv:2204.02311"

    coefficient: Annotated[float, Field(ge=0, description="weight of log² Z per token")] = 1e-4

    def build(self, run: Run, tokenizer: Tokenizer) -> ZLossObjective:
        from sky_demo.z_loss import ZLossObjective

        return ZLossObjective(self.coefficient)


@hookimpl
def sky_attention() -> list[type[Attention]]:
    return [Linear]


@hookimpl
def sky_objectives() -> list[type[Objective]]:
    return [ZLoss]


@hookimpl
def sky_commands(app: click.Group) -> None:
    from sky_demo.commands import demo

    app.add_command(demo)
