"""Core's model parts as run-file options: the decoder and what its slots can hold. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from sky_core import slots
from sky_core.component import Slot, Tiled

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sky_core.model.decoder import DecoderLM
    from sky_core.model.position import PositionEncoding


class PreNorm(slots.Block):
    """Norms inside the residual branches: x + f(norm(x))."""

    kind: ClassVar = "pre"
    paper: ClassVar = "arXiv:2002.04745"

    def build(
        self, spec: slots.LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None
    ) -> nn.Module:
        from sky_core.model.block import PreNormBlock

        return PreNormBlock(spec, attention, feedforward, memory)


class PostNorm(slots.Block):
    """Norms on the residual stream, as in the original Transformer: norm(x + f(x))."""

    kind: ClassVar = "post"
    paper: ClassVar = "arXiv:1706.03762"
    final_norm: ClassVar[bool] = False

    def build(
        self, spec: slots.LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None
    ) -> nn.Module:
        from sky_core.model.block import PostNormBlock

        return PostNormBlock(spec, attention, feedforward, memory)


class Full(slots.Attention):
    """Every token attends to all before it; multi-head, grouped or multi-query by the model's `n_kv_head`."""

    kind: ClassVar = "full"
    paper: ClassVar = "arXiv:1706.03762"

    def build(self, spec: slots.AttentionSpec) -> nn.Module:
        from sky_core.model.attention import SelfAttention

        return SelfAttention(spec)


class Naive(slots.Kernel):
    """The equation as it stands, weights held in memory: the one to read."""

    kind: ClassVar = "naive"
    paper: ClassVar = "arXiv:1706.03762"

    def build(self) -> Callable[..., torch.Tensor]:
        from sky_core.model.kernels import naive

        return naive


class Sdpa(slots.Kernel):
    """torch's fused scaled_dot_product_attention (FlashAttention on CPU and CUDA)."""

    kind: ClassVar = "sdpa"
    paper: ClassVar = "arXiv:2307.08691"

    def build(self) -> Callable[..., torch.Tensor]:
        from sky_core.model.kernels import sdpa

        return sdpa


class Auto(slots.Kernel):
    """The fastest kernel that core has for this machine; the log says which."""

    kind: ClassVar = "auto"
    paper: ClassVar = "arXiv:2307.08691"
    implementation: ClassVar = "sky_core.model.kernels:sdpa"

    def build(self) -> Callable[..., torch.Tensor]:
        from sky_core.model.kernels import choose

        return choose()


class GELU(slots.FeedForward):
    """Two linear maps with a GELU between them, as in GPT-2."""

    kind: ClassVar = "gelu"
    paper: ClassVar = "arXiv:1606.08415"
    d_ff: Annotated[int | None, Field(ge=1, description="hidden units; null: 4 d_model")] = None
    approximate: Annotated[
        Literal["none", "tanh"], Field(description="tanh: the approximation that GPT-2's own weights were made with")
    ] = "none"

    def build(self, spec: slots.LayerSpec) -> nn.Module:
        from functools import partial

        from torch.nn.functional import gelu

        from sky_core.model.feedforward import MLP

        return MLP(spec, self.d_ff or 4 * spec.d_model, partial(gelu, approximate=self.approximate))


class ReLU(slots.FeedForward):
    """Two linear maps with a ReLU between them, as in the original Transformer."""

    kind: ClassVar = "relu"
    paper: ClassVar = "arXiv:1706.03762"
    d_ff: Annotated[int | None, Field(ge=1, description="hidden units; null: 4 d_model")] = None

    def build(self, spec: slots.LayerSpec) -> nn.Module:
        from torch.nn.functional import relu

        from sky_core.model.feedforward import MLP

        return MLP(spec, self.d_ff or 4 * spec.d_model, relu)


class ReLU2(slots.FeedForward):
    """Two linear maps with a squared ReLU between them."""

    kind: ClassVar = "relu2"
    paper: ClassVar = "arXiv:2109.08668"
    implementation: ClassVar = "sky_core.model.feedforward:MLP"
    d_ff: Annotated[int | None, Field(ge=1, description="hidden units; null: 4 d_model")] = None

    def build(self, spec: slots.LayerSpec) -> nn.Module:
        from sky_core.model.feedforward import MLP, relu2

        return MLP(spec, self.d_ff or 4 * spec.d_model, relu2)


class SwiGLU(slots.FeedForward):
    """A gated feed-forward part: silu of one linear map times another, then a third."""

    kind: ClassVar = "swiglu"
    paper: ClassVar = "arXiv:2002.05202"
    d_ff: Annotated[
        int | None, Field(ge=1, description="hidden units; null: 8/3 d_model, rounded up to a multiple of 64")
    ] = None

    def build(self, spec: slots.LayerSpec) -> nn.Module:
        from sky_core.model.feedforward import GatedMLP

        return GatedMLP(spec, self.d_ff or -(-8 * spec.d_model // (3 * 64)) * 64)


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


class LayerNorm(slots.Norm):
    """Zero mean and unit variance over the features, with a learned gain and bias."""

    kind: ClassVar = "layernorm"
    paper: ClassVar = "arXiv:1607.06450"
    eps: Annotated[float, Field(gt=0, description="added to the variance")] = 1e-5
    bias: Annotated[bool, Field(description="learn a bias besides the gain")] = True

    def build(self, dim: int) -> nn.Module:
        from sky_core.model.norm import LayerNorm as Built

        return Built(dim, self.eps, self.bias)


class RMSNorm(slots.Norm):
    """Unit root mean square over the features, with a learned gain."""

    kind: ClassVar = "rmsnorm"
    paper: ClassVar = "arXiv:1910.07467"
    eps: Annotated[float, Field(gt=0, description="added to the mean square")] = 1e-6

    def build(self, dim: int) -> nn.Module:
        from sky_core.model.norm import RMSNorm as Built

        return Built(dim, self.eps)


class Decoder(slots.Model):
    """A decoder-only Transformer; the defaults make a Llama-style one."""

    kind: ClassVar = "decoder"
    paper: ClassVar = "arXiv:1706.03762"

    n_layer: Annotated[int, Field(ge=1, description="residual blocks")] = 6
    n_head: Annotated[int, Field(ge=1, description="query heads of each attention layer")] = 6
    n_kv_head: Annotated[
        int | None, Field(ge=1, description="key/value heads, shared by groups of query heads; null: n_head, 1: one")
    ] = None
    d_model: Annotated[int, Field(ge=1, description="width of the residual stream")] = 384
    head_dim: Annotated[int | None, Field(ge=1, description="width of a head; null: d_model / n_head")] = None
    max_length: Annotated[int, Field(ge=1, description="the context: most tokens the model can look back on")] = 1024
    dropout: Annotated[float, Field(ge=0, lt=1, description="probability, on embeddings, weights and residuals")] = 0.0
    bias: Annotated[bool, Field(description="biases in the linear layers")] = False
    tie_embeddings: Annotated[bool, Field(description="the head shares the weight of the embedding")] = True
    initializer_range: Annotated[float, Field(gt=0, description="standard deviation of initial weights")] = 0.02
    qk_norm: Annotated[
        Literal["head", "full"] | None, Field(description="norm queries and keys: each head, or all heads together")
    ] = None

    # Parts are meant by name, like those of a run file, so that the schema of editors names them too.
    block: Annotated[Slot[slots.Block], Field(description="residual wiring")] = Field("pre", validate_default=True)
    attention: Annotated[Tiled[slots.Attention], Field(description="attention of each layer, tiled over depth")] = (
        Field("full", validate_default=True)
    )
    kernel: Annotated[Slot[slots.Kernel], Field(description="how softmax(QKᵀ)V is computed")] = Field(
        "auto", validate_default=True
    )
    feedforward: Annotated[
        Tiled[slots.FeedForward], Field(description="position-wise part of each layer, tiled over depth")
    ] = Field("swiglu", validate_default=True)
    position: Annotated[
        Tiled[slots.Position],
        Field(description="how order is known, tiled over depth; those that act on the embedding act once"),
    ] = Field("rope", validate_default=True)
    norm: Annotated[Slot[slots.Norm], Field(description="normalisation")] = Field("rmsnorm", validate_default=True)
    memory: Annotated[
        Tiled[slots.Memory, None],
        Field(description="memory beside each layer's attention, tiled over depth; null: none"),
    ] = Field(None, validate_default=True)

    @property
    def width_of_head(self) -> int:
        """`head_dim` as used."""
        return self.head_dim or self.d_model // self.n_head

    @model_validator(mode="after")
    def _fits_together(self) -> Decoder:
        def problem(message: str, **values: Any) -> PydanticCustomError:
            return PydanticCustomError("decoder", message, {**self.__dict__, **values})

        if self.head_dim is None and self.d_model % self.n_head:
            raise problem(
                "d_model {d_model} is not a multiple of n_head {n_head}: use d_model {near}, or set head_dim",
                near=-(-self.d_model // self.n_head) * self.n_head,
            )
        if self.n_head % (self.n_kv_head or self.n_head):
            divisors = ", ".join(str(d) for d in range(1, self.n_head + 1) if self.n_head % d == 0)
            raise problem(
                "n_head {n_head} is not a multiple of n_kv_head {n_kv_head}: use one of {divisors}", divisors=divisors
            )
        for position in self.position:
            if isinstance(position, Rope) and self.width_of_head % 2:
                raise problem(
                    "rope turns pairs of numbers, so head_dim must be even, not {width}", width=self.width_of_head
                )
            if isinstance(position, Sinusoidal) and self.d_model % 2:
                raise problem("sinusoidal positions come in pairs, so d_model must be even, not {d_model}")
        return self

    def build(self, vocab_size: int) -> DecoderLM:
        from sky_core.model.decoder import DecoderLM

        return DecoderLM(self, vocab_size)
