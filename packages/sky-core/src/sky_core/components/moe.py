"""Mixture of experts as run-file options. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from sky_core import slots

if TYPE_CHECKING:
    from torch import nn


class MixtureOfExperts(slots.FeedForward):
    """Each token passes a few of many gated feed-forward parts, chosen by a router."""

    kind: ClassVar = "moe"
    paper: ClassVar = "arXiv:1701.06538"
    implementation: ClassVar = "sky_core.model.moe:MixtureOfExperts"

    n_experts: Annotated[int, Field(ge=1, description="experts to choose from")] = 8
    top_k: Annotated[int, Field(ge=1, description="experts that a token passes")] = 2
    d_ff: Annotated[
        int | None,
        Field(ge=1, description="hidden units of one expert; null: SwiGLU's / top_k, up to the next 64"),
    ] = None
    activation: Annotated[Literal["silu", "gelu", "relu", "relu2"], Field(description="of the gate")] = "silu"

    router: Annotated[
        Literal["softmax", "sigmoid"],
        Field(description="scores: softmax over the experts (Mixtral, Qwen3), or each by itself (DeepSeek-V3)"),
    ] = "softmax"
    norm_topk: Annotated[bool, Field(description="divide the weights of the chosen experts by their sum")] = True
    n_groups: Annotated[int, Field(ge=1, description="equal groups of experts (node-limited routing)")] = 1
    top_groups: Annotated[int, Field(ge=1, description="groups that a token may choose experts from")] = 1
    routed_scale: Annotated[float, Field(gt=0, description="factor of the weights of the chosen experts")] = 1.0

    n_shared: Annotated[int, Field(ge=0, description="experts beside these that every token passes")] = 0
    dense_layers: Annotated[int, Field(ge=0, description="first layers that have one SwiGLU instead of experts")] = 0
    d_ff_dense: Annotated[int | None, Field(ge=1, description="hidden units of the dense layers")] = None

    aux_loss: Annotated[float, Field(ge=0, description="weight of the load-balancing loss (Switch, Mixtral)")] = 0.0
    z_loss: Annotated[float, Field(ge=0, description="weight of the router's z-loss (ST-MoE)")] = 0.0
    bias_update: Annotated[
        float, Field(ge=0, description="step of the bias that balances without a loss (DeepSeek-V3: 0.001)")
    ] = 0.0

    @model_validator(mode="after")
    def _fits_together(self) -> MixtureOfExperts:
        def problem(message: str, **values: Any) -> PydanticCustomError:
            return PydanticCustomError("moe", message, {**self.__dict__, **values})

        if self.n_experts % self.n_groups:
            divisors = ", ".join(str(d) for d in range(1, self.n_experts + 1) if self.n_experts % d == 0)
            raise problem(
                "{n_experts} experts do not divide over {n_groups} groups: set n_groups to one of {divisors}",
                divisors=divisors,
            )
        if self.top_groups > self.n_groups:
            raise problem("top_groups {top_groups} is more than n_groups {n_groups}: lower it")
        size = self.n_experts // self.n_groups
        if self.top_groups < self.n_groups and size < 2:
            raise problem(
                "a group scores the sum of its two best experts, but {n_groups} groups of {n_experts} experts hold one"
                " each: set n_groups to {most} or less",
                most=max(d for d in range(1, self.n_experts) if self.n_experts % d == 0) if self.n_experts > 1 else 1,
            )
        if self.top_k > self.n_experts:
            raise problem("top_k {top_k} is more than n_experts {n_experts}: lower it")
        if self.top_k > self.top_groups * size:
            raise problem(
                "top_k {top_k} is more than the {kept} experts of {top_groups} of {n_groups} groups: raise top_groups",
                kept=self.top_groups * size,
            )
        if self.top_k == 1 and self.norm_topk:
            raise problem(
                "top_k 1 with norm_topk makes every weight 1, so the router cannot learn: set norm_topk to false"
            )
        if self.dense_layers and self.d_ff_dense is None:
            raise problem("dense_layers {dense_layers} needs d_ff_dense, the hidden units of these layers")
        if self.d_ff_dense is not None and not self.dense_layers:
            raise problem("d_ff_dense {d_ff_dense} is the width of dense layers, but there are none: set dense_layers")
        if self.z_loss and self.router == "sigmoid":
            raise problem("z_loss {z_loss} bounds the logits of a softmax: use router: softmax, or set z_loss to 0")
        return self

    def build(self, spec: slots.LayerSpec) -> nn.Module:
        from torch.nn import functional as F

        from sky_core.model.feedforward import GatedMLP, gated_width, relu2
        from sky_core.model.moe import MixtureOfExperts as Built
        from sky_core.model.router import Router

        activation = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "relu2": relu2}[self.activation]
        if spec.layer < self.dense_layers and self.d_ff_dense is not None:
            return GatedMLP(spec, self.d_ff_dense, activation)
        router = Router(
            spec.d_model,
            self.n_experts,
            top_k=self.top_k,
            score=self.router,
            norm_topk=self.norm_topk,
            n_groups=self.n_groups,
            top_groups=self.top_groups,
            routed_scale=self.routed_scale,
            correction_bias=self.router == "sigmoid" or self.bias_update > 0,
        )
        return Built(
            spec,
            router,
            self.d_ff or -(-gated_width(spec.d_model) // (self.top_k * 64)) * 64,
            activation,
            n_shared=self.n_shared,
            aux_loss=self.aux_loss,
            z_loss=self.z_loss,
            bias_update=self.bias_update,
        )
