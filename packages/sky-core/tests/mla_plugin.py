"""A loose-file plugin with DeepSeek's latent attention in its plain form, to see that the slot takes it.

DeepSeek-V2 (arXiv:2405.04434), section 2.1: keys and values are projected from a latent c_t that all heads share, and a
part of each key, turned by RoPE, is one for all heads. The cache here holds full keys and values; a real one holds c_t.

B batch, T time, D model width, H heads, R width of a latent, N + E width of a key (E of it turned), F width of a value.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from einops import rearrange
from pydantic import Field
from torch import nn

from sky_core import hookimpl, slots
from sky_core.model.cache import KVCache
from sky_core.model.context import Context
from sky_core.model.norm import RMSNorm

sky_api = 2

Width = Annotated[int, Field(ge=1)]


class LatentAttention(nn.Module):
    """Attention over keys and values of one latent, written out for every token."""

    def __init__(self, spec: slots.AttentionSpec, options: MLA) -> None:
        super().__init__()
        self.layer, self.n_head, self.options = spec.layer, spec.n_head, options
        self.position, self.kernel = spec.position, spec.kernel
        self.k_dim = options.qk_nope_head_dim + options.qk_rope_head_dim
        self.scale = options.scale or self.k_dim**-0.5
        rank = options.q_lora_rank
        if rank is None:
            self.q_proj = nn.Linear(spec.d_model, spec.n_head * self.k_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(spec.d_model, rank, bias=False)
            self.q_a_layernorm = RMSNorm(rank, 1e-6)
            self.q_b_proj = nn.Linear(rank, spec.n_head * self.k_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(spec.d_model, options.kv_lora_rank + options.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(options.kv_lora_rank, 1e-6)
        both = options.qk_nope_head_dim + options.v_head_dim
        self.kv_b_proj = nn.Linear(options.kv_lora_rank, spec.n_head * both, bias=False)
        self.o_proj = nn.Linear(spec.n_head * options.v_head_dim, spec.d_model, bias=False)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        options = self.options
        full = options.q_lora_rank is None
        q_BTA = self.q_proj(x_BTD) if full else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_BHTA = rearrange(q_BTA, "B T (H A) -> B H T A", H=self.n_head)
        latent_BTR, turned_BTE = self.kv_a_proj_with_mqa(x_BTD).split(
            [options.kv_lora_rank, options.qk_rope_head_dim], dim=-1
        )
        kv_BHTC = rearrange(self.kv_b_proj(self.kv_a_layernorm(latent_BTR)), "B T (H C) -> B H T C", H=self.n_head)
        k_BHTN, v_BHTF = kv_BHTC.split([options.qk_nope_head_dim, options.v_head_dim], dim=-1)
        q_BHTN, q_BHTE = q_BHTA.split([options.qk_nope_head_dim, options.qk_rope_head_dim], dim=-1)
        q_BHTE, k_B1TE = self.position.rotate(q_BHTE, turned_BTE[:, None], ctx)
        q = torch.cat((q_BHTN, q_BHTE), dim=-1)
        k = torch.cat((k_BHTN, k_B1TE.expand(-1, self.n_head, -1, -1)), dim=-1)
        v = v_BHTF
        if ctx.cache is not None:
            k, v = ctx.cache.layers[self.layer].update(k, v, ctx)
        y_BHTF = self.kernel(q, k, v, ctx.mask, scale=self.scale, dropout=0.0)
        return self.o_proj(rearrange(y_BHTF, "B H T F -> B T (H F)"))

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        return KVCache.empty(batch, self.n_head, max_length, self.k_dim, self.options.v_head_dim, device, dtype)


class MLA(slots.Attention):
    """Latent attention; the model's head_dim is `qk_rope_head_dim`."""

    kind: ClassVar = "mla"
    paper: ClassVar = "arXiv:2405.04434"

    q_lora_rank: Width | None = None
    kv_lora_rank: Width
    qk_nope_head_dim: Width
    qk_rope_head_dim: Width
    v_head_dim: Width
    scale: float | None = None

    def build(self, spec: slots.AttentionSpec) -> nn.Module:
        return LatentAttention(spec, self)


@hookimpl
def sky_attention() -> list[type[slots.Attention]]:
    return [MLA]
