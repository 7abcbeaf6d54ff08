"""Multi-head self-attention with all, some or one key/value head.

Vaswani et al. 2017, section 3.2.2: head_h = attention(x W_q^h, x W_k^h, x W_v^h), output = concat(heads) W_o.
Relative to the paper:
- with n_kv_head < n_head several query heads share keys and values (grouped queries, Ainslie et al. 2023,
  arXiv:2305.13245; one head for all: multi-query, Shazeer 2019, arXiv:1911.02150);
- q and k may be normed before their product (Henry et al. 2020, arXiv:2010.04245), each head by itself or all together;
- scores may be bounded, c tanh(score / c), and a window may leave the newest tokens only (Gemma 2, arXiv:2408.00118);
- the values may get a vector of the token itself, from a table E of the layer (value embeddings: Zhou et al. 2024,
  arXiv:2410.17897; modded-nanoGPT; gated as in nanochat): v_t + 2 sigmoid(W_g x_t) E[token_t], a gate for each
  key/value head, 1 at the start (nanochat's gate reads the first 32 numbers of x_t only).

B batch, T time, D model width, H query heads, G key/value heads, S keys, E width of a head.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import nn

from sky_core.model.cache import KVCache
from sky_core.model.context import Context
from sky_core.model.kernels import attention_weights
from sky_core.slots import AttentionSpec


class SelfAttention(nn.Module):
    """Attention of a sequence to itself under `ctx.mask`, with a cache of keys and values."""

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        bias: bool | None = None,
        out_bias: bool | None = None,
        value_embedding: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.head_dim, self.n_kv_head = spec.layer, spec.head_dim, spec.n_kv_head
        self.scale, self.softcap, self.window = scale or spec.scale, softcap, window
        self.dropout, self.kernel, self.position = spec.dropout, spec.kernel, spec.position
        width, kv_width = spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim
        bias, out_bias = (spec.bias if own is None else own for own in (bias, out_bias))
        self.q_proj = nn.Linear(spec.d_model, width, bias=bias)
        self.k_proj = nn.Linear(spec.d_model, kv_width, bias=bias)
        self.v_proj = nn.Linear(spec.d_model, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, spec.d_model, bias=out_bias)
        self.qk_norm = spec.qk_norm
        if spec.qk_norm is not None:
            self.q_norm = spec.norm(spec.head_dim if spec.qk_norm == "head" else width)
            self.k_norm = spec.norm(spec.head_dim if spec.qk_norm == "head" else kv_width)
        self.value_embed = nn.Embedding(spec.vocab_size, kv_width) if value_embedding else None
        self.value_gate = _Gate(spec.d_model, spec.n_kv_head) if value_embedding else None

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHTE, k_BGSE, v_BGSE = (rearrange(z, "B T (H E) -> B H T E", E=self.head_dim) for z in (q, k, v))
        if self.qk_norm == "head":
            q_BHTE, k_BGSE = self.q_norm(q_BHTE), self.k_norm(k_BGSE)
        if self.value_embed is not None and self.value_gate is not None:
            own_BGSE = rearrange(self.value_embed(ctx.tokens_BT), "B T (G E) -> B G T E", E=self.head_dim)
            v_BGSE = v_BGSE + self.value_gate(x_BTD) * own_BGSE.to(v_BGSE.dtype)
        q_BHTE, k_BGSE = self.position.rotate(q_BHTE, k_BGSE, ctx)

        mask = ctx.mask if self.window is None else ctx.mask.with_window(self.window)
        mask = self.position.mask(mask)
        if ctx.cache is not None:
            cache = cast(KVCache, ctx.cache.layers[self.layer])
            k_BGSE, v_BGSE = (z.to(q_BHTE.dtype) for z in cache.update(k_BGSE, v_BGSE, ctx))
        if ctx.prefixes and self.layer in ctx.prefixes:
            k_BGPE, v_BGPE = (z.to(q_BHTE.dtype).expand(len(x_BTD), -1, -1, -1) for z in ctx.prefixes[self.layer])
            k_BGSE, v_BGSE = torch.cat((k_BGPE, k_BGSE), dim=2), torch.cat((v_BGPE, v_BGSE), dim=2)
            mask = mask.with_front(k_BGPE.shape[2])
        scale, softcap, dropout = self.scale, self.softcap, self.dropout if self.training else 0.0
        if ctx.collect is not None and "attention" in ctx.collect:
            ctx.collect["attention"][self.layer] = attention_weights(q_BHTE, k_BGSE, mask, scale=scale, softcap=softcap)
        y_BHTE = self.kernel(q_BHTE, k_BGSE, v_BGSE, mask, scale=scale, dropout=dropout, softcap=softcap)
        return self.o_proj(rearrange(y_BHTE, "B H T E -> B T (H E)"))

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """Room for the keys and values of `max_length` tokens per row."""
        return KVCache.empty(batch, self.n_kv_head, max_length, self.head_dim, self.head_dim, device, dtype)


class _Gate(nn.Linear):
    """gate_BGT1 = 2 sigmoid(W x_BTD): 1 at the start, between 0 and 2 later."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__(d_model, heads, bias=False)

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        gate_BTG = 2 * super().forward(x_BTD).sigmoid()
        return gate_BTG.transpose(1, 2)[..., None]
