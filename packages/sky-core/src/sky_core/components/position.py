"""Core's position encodings as run-file options. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sky_core import slots

if TYPE_CHECKING:
    from sky_core.model.position import PositionEncoding


class Learned(slots.Position):
    """One trained vector per position, added to the embedding."""

    kind: ClassVar = "learned"
    paper: ClassVar = "arXiv:1705.03122"

    def build(self, d_model: int, head_dim: int, max_length: int) -> PositionEncoding:
        from sky_core.model.position import LearnedPosition

        return LearnedPosition(d_model, max_length)


class Sinusoidal(slots.Position):
    """Fixed sines and cosines added to the (scaled) embedding, as in the original Transformer."""

    kind: ClassVar = "sinusoidal"
    paper: ClassVar = "arXiv:1706.03762"

    def build(self, d_model: int, head_dim: int, max_length: int) -> PositionEncoding:
        from sky_core.model.position import SinusoidalPosition

        return SinusoidalPosition(d_model)


class Rope(slots.Position):
    """Queries and keys are rotated by an angle that grows with their position."""

    kind: ClassVar = "rope"
    paper: ClassVar = "arXiv:2104.09864"
    theta: Annotated[float, Field(gt=1, description="base of the wavelengths; longer contexts want a larger one")] = 1e4

    def build(self, d_model: int, head_dim: int, max_length: int) -> PositionEncoding:
        from sky_core.model.position import RotaryPosition

        return RotaryPosition(head_dim, self.theta)


class NoPosition(slots.Position):
    """No encoding: the causal mask alone tells the order."""

    kind: ClassVar = "none"
    paper: ClassVar = "arXiv:2305.19466"

    def build(self, d_model: int, head_dim: int, max_length: int) -> PositionEncoding:
        from sky_core.model.position import PositionEncoding

        return PositionEncoding()
