"""Core's attention layers and kernels as run-file options. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from sky_core import slots

if TYPE_CHECKING:
    import torch
    from torch import nn


class Full(slots.Attention):
    """Every token attends to all before it; multi-head, grouped or multi-query by the model's `n_kv_head`."""

    kind: ClassVar = "full"
    paper: ClassVar = "arXiv:1706.03762"

    window: Annotated[
        int | None, Field(ge=1, description="newest tokens that are seen, the own included; null: all")
    ] = None
    scale: Annotated[
        float | None, Field(gt=0, description="what scores are multiplied with; null: 1 / sqrt(head_dim), or muP's")
    ] = None
    softcap: Annotated[float | None, Field(gt=0, description="bound of the scores: c tanh(score / c)")] = None
    bias: Annotated[bool | None, Field(description="biases in q_proj, k_proj and v_proj; null: as the model")] = None
    out_bias: Annotated[bool | None, Field(description="a bias in o_proj; null: as the model")] = None
    value_embedding: Annotated[
        bool, Field(description="add a gated vector of the token itself, from a table of the layer, to the values")
    ] = False

    def build(self, spec: slots.AttentionSpec) -> nn.Module:
        from sky_core.model.attention import SelfAttention

        return SelfAttention(
            spec,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            bias=self.bias,
            out_bias=self.out_bias,
            value_embedding=self.value_embedding,
        )


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
    implementation: ClassVar = "sky_core.model.kernels:auto"

    def build(self) -> Callable[..., torch.Tensor]:
        from sky_core.model.kernels import choose

        return choose()
