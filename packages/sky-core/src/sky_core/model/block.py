"""The residual wiring of one layer: where the norms stand.

    pre    x + f(norm(x))     (Xiong et al. 2020, arXiv:2002.04745, figure 1b; GPT-2): the stack ends with a norm
    post   norm(x + f(x))     (Vaswani et al. 2017, section 3.1): the residual stream itself is normed

f is attention (with the memory beside it, reading the same input), then the feed-forward part; dropout acts on what f
adds (Vaswani et al. 2017, section 5.4).

B batch, T time, D model width.
"""

from __future__ import annotations

import torch
from torch import nn

from sky_core.model.context import Context
from sky_core.slots import LayerSpec


class PreNormBlock(nn.Module):
    """Norms stand inside the residual branches."""

    def __init__(self, spec: LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None) -> None:
        super().__init__()
        self.input_layernorm = spec.norm(spec.d_model)
        self.self_attn = attention
        self.memory = memory
        self.post_attention_layernorm = spec.norm(spec.d_model)
        self.mlp = feedforward
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        h_BTD = self.input_layernorm(x_BTD)
        x_BTD = x_BTD + self.dropout(self.self_attn(h_BTD, ctx))
        if self.memory is not None:
            x_BTD = x_BTD + self.memory(h_BTD, ctx)
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD), ctx))


class PostNormBlock(nn.Module):
    """Norms stand on the residual stream, after each sum."""

    def __init__(self, spec: LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None) -> None:
        super().__init__()
        self.self_attn = attention
        self.memory = memory
        self.post_attention_layernorm = spec.norm(spec.d_model)
        self.mlp = feedforward
        self.post_feedforward_layernorm = spec.norm(spec.d_model)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        y_BTD = self.dropout(self.self_attn(x_BTD, ctx))
        if self.memory is not None:
            y_BTD = y_BTD + self.memory(x_BTD, ctx)
        x_BTD = self.post_attention_layernorm(x_BTD + y_BTD)
        return self.post_feedforward_layernorm(x_BTD + self.dropout(self.mlp(x_BTD, ctx)))
