"""The residual wiring of one layer: where the norms stand.

    pre         x + f(norm(x))          (Xiong et al. 2020, arXiv:2002.04745, figure 1b; GPT-2)
    post        norm(x + f(x))          (Vaswani et al. 2017, section 3.1): the residual stream itself is normed
    reordered   x + norm(f(x))          (OLMo 2, arXiv:2501.00656, section 2.1; after Liu et al. 2021, Swin v2)
    sandwich    x + norm'(f(norm(x)))   (Gemma 2, arXiv:2408.00118, section 2; after Ding et al. 2021, CogView)
    parallel    x + attn(norm(x)) + mlp(norm'(x))   (GPT-NeoX, arXiv:2204.06745, section 2.1; GPT-J has one norm)

f is attention (with the memory beside it, reading the same input), then the feed-forward part; dropout acts on what f
adds (Vaswani et al. 2017, section 5.4). All but `post` leave the stream unnormed, so the stack ends with a norm.

`pre` may give each layer two learned numbers: x becomes r x + s x0 before the block, x0 what entered the first one
(modded-nanoGPT, nanochat). r starts at 1 and s at 0, where nothing changes.

B batch, T time, D model width.
"""

from __future__ import annotations

import torch
from torch import nn

from sky_core.model.context import Context
from sky_core.slots import LayerSpec


class ResidualBlock(nn.Module):
    """What all wirings hold: the parts of a layer, under their names."""

    def __init__(self, spec: LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None) -> None:
        super().__init__()
        self.self_attn = attention
        self.memory = memory
        self.mlp = feedforward
        self.dropout = nn.Dropout(spec.dropout)

    def attend(self, h_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        """What attention and memory together add, before any norm behind them."""
        y_BTD = self.dropout(self.self_attn(h_BTD, ctx))
        return y_BTD if self.memory is None else y_BTD + self.memory(h_BTD, ctx)

    def think(self, h_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        """What the feed-forward part adds, before any norm behind it."""
        return self.dropout(self.mlp(h_BTD, ctx))


class PreNormBlock(ResidualBlock):
    """Norms stand inside the residual branches."""

    def __init__(
        self,
        spec: LayerSpec,
        attention: nn.Module,
        feedforward: nn.Module,
        memory: nn.Module | None,
        residual_scalars: bool = False,
    ) -> None:
        super().__init__(spec, attention, feedforward, memory)
        self.input_layernorm = spec.norm(spec.d_model)
        self.post_attention_layernorm = spec.norm(spec.d_model)
        self.residual_scalars = nn.Parameter(torch.tensor([1.0, 0.0])) if residual_scalars else None

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        if self.residual_scalars is not None and ctx.embedding_BTD is not None:
            residual, embedding = self.residual_scalars.to(x_BTD.dtype)
            x_BTD = residual * x_BTD + embedding * ctx.embedding_BTD
        x_BTD = x_BTD + self.attend(self.input_layernorm(x_BTD), ctx)
        return x_BTD + self.think(self.post_attention_layernorm(x_BTD), ctx)


class PostNormBlock(ResidualBlock):
    """Norms stand on the residual stream, after each sum."""

    def __init__(self, spec: LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None) -> None:
        super().__init__(spec, attention, feedforward, memory)
        self.post_attention_layernorm = spec.norm(spec.d_model)
        self.post_feedforward_layernorm = spec.norm(spec.d_model)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        x_BTD = self.post_attention_layernorm(x_BTD + self.attend(x_BTD, ctx))
        return self.post_feedforward_layernorm(x_BTD + self.think(x_BTD, ctx))


class ReorderedNormBlock(PostNormBlock):
    """Norms stand behind each branch, inside the sum."""

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        x_BTD = x_BTD + self.post_attention_layernorm(self.attend(x_BTD, ctx))
        return x_BTD + self.post_feedforward_layernorm(self.think(x_BTD, ctx))


class SandwichBlock(PostNormBlock):
    """Norms stand before and behind each branch."""

    def __init__(self, spec: LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None) -> None:
        super().__init__(spec, attention, feedforward, memory)
        self.input_layernorm = spec.norm(spec.d_model)
        self.pre_feedforward_layernorm = spec.norm(spec.d_model)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        x_BTD = x_BTD + self.post_attention_layernorm(self.attend(self.input_layernorm(x_BTD), ctx))
        return x_BTD + self.post_feedforward_layernorm(self.think(self.pre_feedforward_layernorm(x_BTD), ctx))


class ParallelBlock(PreNormBlock):
    """Attention and feed-forward part read the same stream and add to it together."""

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        attended_BTD = self.attend(self.input_layernorm(x_BTD), ctx)
        return x_BTD + attended_BTD + self.think(self.post_attention_layernorm(x_BTD), ctx)
