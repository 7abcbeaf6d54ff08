"""Core's residual wirings, feed-forward parts and norms as run-file options. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from sky_core import slots

if TYPE_CHECKING:
    from torch import nn


class PreNorm(slots.Block):
    """Norms inside the residual branches: x + f(norm(x))."""

    kind: ClassVar = "pre"
    paper: ClassVar = "arXiv:2002.04745"

    residual_scalars: Annotated[
        bool, Field(description="learn two numbers a layer: x becomes r x + s x0, x0 the embedding, before the block")
    ] = False

    def build(
        self, spec: slots.LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None
    ) -> nn.Module:
        from sky_core.model.block import PreNormBlock

        return PreNormBlock(spec, attention, feedforward, memory, self.residual_scalars)


class Sandwich(slots.Block):
    """Norms before and behind each residual branch, as in Gemma 2: x + norm(f(norm(x)))."""

    kind: ClassVar = "sandwich"
    paper: ClassVar = "arXiv:2408.00118"

    def build(
        self, spec: slots.LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None
    ) -> nn.Module:
        from sky_core.model.block import SandwichBlock

        return SandwichBlock(spec, attention, feedforward, memory)


class Reordered(slots.Block):
    """Norms behind each residual branch, inside the sum, as in OLMo 2: x + norm(f(x))."""

    kind: ClassVar = "reordered"
    paper: ClassVar = "arXiv:2501.00656"

    def build(
        self, spec: slots.LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None
    ) -> nn.Module:
        from sky_core.model.block import ReorderedNormBlock

        return ReorderedNormBlock(spec, attention, feedforward, memory)


class Parallel(slots.Block):
    """Attention and feed-forward part side by side, as in GPT-NeoX: x + attn(norm(x)) + mlp(norm'(x))."""

    kind: ClassVar = "parallel"
    paper: ClassVar = "arXiv:2204.06745"

    def build(
        self, spec: slots.LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None
    ) -> nn.Module:
        from sky_core.model.block import ParallelBlock

        return ParallelBlock(spec, attention, feedforward, memory)


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


GatedWidth = Annotated[
    int | None, Field(ge=1, description="hidden units; null: 8/3 d_model, rounded up to a multiple of 64")
]


class SwiGLU(slots.FeedForward):
    """A gated feed-forward part: silu of one linear map times another, then a third."""

    kind: ClassVar = "swiglu"
    paper: ClassVar = "arXiv:2002.05202"
    implementation: ClassVar = "sky_core.model.feedforward:GatedMLP"
    d_ff: GatedWidth = None

    def build(self, spec: slots.LayerSpec) -> nn.Module:
        from torch.nn.functional import silu

        from sky_core.model.feedforward import GatedMLP, gated_width

        return GatedMLP(spec, self.d_ff or gated_width(spec.d_model), silu)


class GEGLU(slots.FeedForward):
    """SwiGLU with a GELU for the gate, as in Gemma."""

    kind: ClassVar = "geglu"
    paper: ClassVar = "arXiv:2002.05202"
    implementation: ClassVar = "sky_core.model.feedforward:GatedMLP"
    d_ff: GatedWidth = None
    approximate: Annotated[
        Literal["none", "tanh"], Field(description="tanh: the approximation that Gemma's weights were made with")
    ] = "none"

    def build(self, spec: slots.LayerSpec) -> nn.Module:
        from functools import partial

        from torch.nn.functional import gelu

        from sky_core.model.feedforward import GatedMLP, gated_width

        return GatedMLP(spec, self.d_ff or gated_width(spec.d_model), partial(gelu, approximate=self.approximate))


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
    gain: Annotated[
        Literal["one", "zero", "none"],
        Field(description="the gain is learned around one, as 1 + w around zero (Gemma), or there is none (nanochat)"),
    ] = "one"

    def build(self, dim: int) -> nn.Module:
        from sky_core.model.norm import RMSNorm as Built

        return Built(dim, self.eps, self.gain)
