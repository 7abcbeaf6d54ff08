"""Core's position encodings as run-file options. Torch-free."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from sky_core import slots
from sky_core.component import Schema, closest
from sky_core.errors import UserError

if TYPE_CHECKING:
    import torch

    from sky_core.model.position import PositionEncoding


class Learned(slots.Position):
    """One trained vector per position, added to the embedding."""

    kind: ClassVar = "learned"
    paper: ClassVar = "arXiv:1705.03122"

    def build(self, d_model: int, head_dim: int, max_length: int, n_head: int) -> PositionEncoding:
        from sky_core.model.position import LearnedPosition

        return LearnedPosition(d_model, max_length)


class Sinusoidal(slots.Position):
    """Fixed sines and cosines added to the (scaled) embedding, as in the original Transformer."""

    kind: ClassVar = "sinusoidal"
    paper: ClassVar = "arXiv:1706.03762"

    def build(self, d_model: int, head_dim: int, max_length: int, n_head: int) -> PositionEncoding:
        from sky_core.model.position import SinusoidalPosition

        return SinusoidalPosition(d_model)


Factor = Annotated[float, Field(ge=1, description="how many times longer the context is than that of training")]
OriginalLength = Annotated[int, Field(ge=1, description="tokens of the context that the model was trained on")]


class Scaling(Schema):
    """How RoPE is stretched over contexts longer than those of training."""

    @abstractmethod
    def frequencies(self, dim: int, theta: float) -> tuple[torch.Tensor, float]:
        """Radians per token of each of the dim / 2 planes (fp32, CPU), and what cos and sin are multiplied with."""


class LinearScaling(Scaling):
    """Position interpolation: every frequency divided by `factor` (arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: Factor

    def frequencies(self, dim: int, theta: float) -> tuple[torch.Tensor, float]:
        from sky_core.model.rope_scaling import linear_frequencies

        return linear_frequencies(dim, theta, self.factor), 1.0


class DynamicScaling(Scaling):
    """Dynamic NTK: the base grows with the sequence once that exceeds `original_length` (arXiv:2309.00071)."""

    kind: Literal["dynamic"] = "dynamic"
    factor: Factor
    original_length: OriginalLength

    def frequencies(self, dim: int, theta: float) -> tuple[torch.Tensor, float]:
        """Those of sequences up to `original_length`."""
        from sky_core.model.rope_scaling import plain_frequencies

        return plain_frequencies(dim, theta), 1.0


class Llama3Scaling(Scaling):
    """Llama 3.1: slow planes divided by `factor`, fast ones kept, a blend between (arXiv:2407.21783)."""

    kind: Literal["llama3"] = "llama3"
    factor: Factor
    low_freq_factor: Annotated[float, Field(gt=0, description="planes of fewer turns are divided by factor")] = 1.0
    high_freq_factor: Annotated[float, Field(gt=0, description="planes of more turns are kept")] = 4.0
    original_length: OriginalLength

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Llama3Scaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise PydanticCustomError(
                "llama3",
                "low_freq_factor {low_freq_factor} must be less than high_freq_factor {high_freq_factor}",
                dict(self.__dict__),
            )
        return self

    def frequencies(self, dim: int, theta: float) -> tuple[torch.Tensor, float]:
        from sky_core.model.rope_scaling import llama3_frequencies

        options = (self.factor, self.low_freq_factor, self.high_freq_factor, self.original_length)
        return llama3_frequencies(dim, theta, *options), 1.0


class YarnScaling(Scaling):
    """YaRN: a ramp from kept to interpolated planes, and sharper attention (arXiv:2309.00071)."""

    kind: Literal["yarn"] = "yarn"
    factor: Factor
    original_length: OriginalLength
    beta_fast: Annotated[float, Field(gt=0, description="planes of more turns are kept")] = 32.0
    beta_slow: Annotated[float, Field(gt=0, description="planes of fewer turns are interpolated")] = 1.0
    attention_factor: Annotated[
        float | None, Field(gt=0, description="what cos and sin are multiplied with; null: 0.1 ln(factor) + 1")
    ] = None
    mscale: Annotated[
        float | None, Field(gt=0, description="DeepSeek: 0.1 mscale ln(factor) + 1, over that of mscale_all_dim")
    ] = None
    mscale_all_dim: Annotated[float | None, Field(gt=0, description="DeepSeek: counts with mscale only")] = None
    truncate: Annotated[bool, Field(description="the ramp begins and ends at whole planes")] = True

    @model_validator(mode="after")
    def _slow_is_below_fast(self) -> YarnScaling:
        if self.beta_slow >= self.beta_fast:
            raise PydanticCustomError(
                "yarn", "beta_slow {beta_slow} must be less than beta_fast {beta_fast}", dict(self.__dict__)
            )
        return self

    def frequencies(self, dim: int, theta: float) -> tuple[torch.Tensor, float]:
        from sky_core.model.rope_scaling import yarn_frequencies, yarn_mscale

        attention_factor = self.attention_factor
        if attention_factor is None and self.mscale and self.mscale_all_dim:
            attention_factor = yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        elif attention_factor is None:
            attention_factor = yarn_mscale(self.factor)
        ramp = (self.beta_fast, self.beta_slow, self.truncate)
        return yarn_frequencies(dim, theta, self.factor, self.original_length, *ramp), attention_factor


SCALINGS: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}


def _by_kind(value: Any, union: Callable[[Any], Any]) -> Any:
    """The table that `kind` names, so that problems are told of that one alone."""
    if not isinstance(value, Mapping | str):
        return union(value)
    have = ", ".join(SCALINGS)
    kind = value.get("kind") if isinstance(value, Mapping) else value
    if kind is None:
        raise PydanticCustomError("no_kind", "which scaling? give 'kind' (have: {have})", {"have": have})
    if kind not in SCALINGS:
        told = {"kind": repr(kind), "have": have, "near": closest(str(kind), SCALINGS)}
        raise PydanticCustomError("unknown_kind", "no scaling of rope called {kind} (have: {have}){near}", told)
    return SCALINGS[kind].model_validate({"kind": kind} if isinstance(value, str) else value)


class Rope(slots.Position):
    """Queries and keys are rotated by an angle that grows with their position."""

    kind: ClassVar = "rope"
    paper: ClassVar = "arXiv:2104.09864"
    implementation: ClassVar = "sky_core.model.rope:RotaryPosition"

    theta: Annotated[float, Field(gt=1, description="base of the wavelengths; longer contexts want a larger one")] = 1e4
    scaling: Annotated[
        LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | None,
        WrapValidator(_by_kind),
        Field(description="stretch to contexts longer than those of training: {kind: yarn, ...}"),
    ] = None
    fraction: Annotated[
        float, Field(gt=0, le=1, description="part of each head that is turned, its first numbers (GPT-NeoX: 0.25)")
    ] = 1.0
    truncated: Annotated[
        bool, Field(description="half of the planes do not turn, the others from 1 to 1/theta (modded-nanoGPT)")
    ] = False
    interleaved: Annotated[bool, Field(description="planes are pairs (2i, 2i + 1), as in GPT-J and DeepSeek-V3")] = (
        False
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Rope:
        if self.truncated and self.scaling is not None:
            raise PydanticCustomError("rope", "truncated rope has no scaling: leave one of the two out")
        return self

    def turned(self, head_dim: int) -> int:
        """How many numbers of a head are turned."""
        return int(head_dim * self.fraction)

    def misfit(self, head_dim: int) -> str | None:
        """Why these options do not fit heads of that width, None when they do."""
        number = self.turned(head_dim)
        if self.truncated:
            fits, wanted = number > 0 and number % 4 == 0, "a multiple of 4"
        elif isinstance(self.scaling, DynamicScaling):
            fits, wanted = number > 2 and number % 2 == 0, "even and more than 2"
        else:
            fits, wanted = number > 0 and number % 2 == 0, "even" if number else "at least 2"
        whole = "head_dim" if self.fraction == 1 else f"fraction {self.fraction:g} of head_dim {head_dim}"
        return None if fits else f"rope turns pairs of numbers, so {whole} must be {wanted}, not {number}"

    def build(self, d_model: int, head_dim: int, max_length: int, n_head: int) -> PositionEncoding:
        from sky_core.model.rope import DynamicRotaryPosition, RotaryPosition

        if misfit := self.misfit(head_dim):
            raise UserError(misfit)
        dim = self.turned(head_dim)
        if isinstance(self.scaling, DynamicScaling):
            return DynamicRotaryPosition(dim, self.theta, scaling=self.scaling, interleaved=self.interleaved)
        return RotaryPosition(
            dim, self.theta, scaling=self.scaling, truncated=self.truncated, interleaved=self.interleaved
        )


class Alibi(slots.Position):
    """Scores fall with the distance of their key, in each head at another slope."""

    kind: ClassVar = "alibi"
    paper: ClassVar = "arXiv:2108.12409"

    def build(self, d_model: int, head_dim: int, max_length: int, n_head: int) -> PositionEncoding:
        from sky_core.model.alibi import AlibiPosition

        return AlibiPosition(n_head)


class NoPosition(slots.Position):
    """No encoding: the causal mask alone tells the order."""

    kind: ClassVar = "none"
    paper: ClassVar = "arXiv:2305.19466"

    def build(self, d_model: int, head_dim: int, max_length: int, n_head: int) -> PositionEncoding:
        from sky_core.model.position import PositionEncoding

        return PositionEncoding()
