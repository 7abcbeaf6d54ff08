"""Linear attention (Katharopoulos et al. 2020, "Transformers are RNNs", arXiv:2006.16236).

Softmax attention compares every query with every key. With a feature map φ(x) = elu(x) + 1 in place of exp (equation
7), the sum over keys can be taken once and carried along (equations 9, 18 to 20):

    S_t = S_{t-1} + φ(k_t) v_tᵀ        z_t = z_{t-1} + φ(k_t)        y_t = φ(q_t)ᵀ S_t / φ(q_t)ᵀ z_t

so (S, z) is the whole cache. Tokens are taken in chunks: inside a chunk by the quadratic form under the mask, between
chunks by the state. One chunk is the parallel form, chunks of one token the recurrence; they are equal.

Relative to the paper: query heads may share keys and values; rotary positions turn the numerator only (Su et al. 2021,
arXiv:2104.09864, equation 19), so the weights still sum to a positive number.

B batch, T time, D model width, G key/value heads, R query heads per key/value head, E width of a head, F the same for
values, C tokens of a chunk, P tokens of a key/value prefix.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn

from sky_core.errors import UserError
from sky_core.model.cache import LayerCache
from sky_core.model.context import Context
from sky_core.slots import AttentionSpec


def feature_map(x: torch.Tensor) -> torch.Tensor:
    """φ(x) = elu(x) + 1 > 0."""
    return nn.functional.elu(x) + 1


class LinearState(LayerCache):
    """Sums over the tokens so far: S of φ(k) vᵀ (keys turned by their positions), z of φ(k)."""

    def __init__(self, s_BGEF: torch.Tensor, z_BGE: torch.Tensor) -> None:
        self.s_BGEF = s_BGEF
        self.z_BGE = z_BGE

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"s": self.s_BGEF, "z": self.z_BGE}

    def replace(self, tensors: dict[str, torch.Tensor]) -> LinearState:
        return LinearState(tensors["s"], tensors["z"])

    def reset(self, rows_B: torch.Tensor) -> None:
        self.s_BGEF[rows_B] = 0
        self.z_BGE[rows_B] = 0


class LinearAttention(nn.Module):
    """Causal linear attention with a state of fixed size."""

    def __init__(self, spec: AttentionSpec, chunk: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.n_kv_head, self.chunk = spec.layer, spec.head_dim, spec.n_kv_head, chunk
        self.position = spec.position
        width, kv_width = spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim
        self.q_proj = nn.Linear(spec.d_model, width, bias=spec.bias)
        self.k_proj = nn.Linear(spec.d_model, kv_width, bias=spec.bias)
        self.v_proj = nn.Linear(spec.d_model, kv_width, bias=spec.bias)
        self.o_proj = nn.Linear(width, spec.d_model, bias=spec.bias)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        q, k, v = (
            rearrange(projection(x_BTD), "B T (H E) -> B H T E", E=self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = feature_map(q), feature_map(k)
        if ctx.valid_BT is not None:  # padding adds nothing to the sums; its positive features would
            k = k * ctx.valid_BT[:, None, :, None]
        turned_q, turned_k = self.position.rotate(q, k, ctx)
        q, turned_q = (rearrange(x, "B (G R) T E -> B G R T E", G=self.n_kv_head) for x in (q, turned_q))

        state = self._start(x_BTD, ctx)
        front = ctx.prefixes.get(self.layer)
        ahead = state if front is None else _added(state, feature_map(front[0]), feature_map(front[0]), front[1])
        outputs = []
        for start, stop in self._chunks(x_BTD.shape[1], ctx):
            part = slice(start, stop)
            keys = (turned_k[:, :, part], k[:, :, part], v[:, :, part])
            outputs.append(_attend(turned_q[:, :, :, part], q[:, :, :, part], *keys, ahead, self._allowed(part, ctx)))
            ahead = _added(ahead, *keys)
        if ctx.cache is not None:
            state = _added(state, turned_k, k, v)
            ctx.cache.layers[self.layer].s_BGEF, ctx.cache.layers[self.layer].z_BGE = state
        return self.o_proj(rearrange(torch.cat(outputs, dim=3), "B G R T F -> B T (G R F)"))

    def _start(self, x_BTD: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """(S, z) before the first token of this pass."""
        if ctx.cache is None:
            s_BGEF = x_BTD.new_zeros(len(x_BTD), self.n_kv_head, self.head_dim, self.head_dim)
            return s_BGEF, s_BGEF[..., 0]
        if ctx.mask.prefix_B is not None:
            raise UserError("linear attention has no cache for prefix language models: its sums keep no single keys")
        state = ctx.cache.layers[self.layer]
        return state.s_BGEF, state.z_BGE

    def _chunks(self, tokens: int, ctx: Context) -> list[tuple[int, int]]:
        """Bounds of the chunks: one chunk when the mask is more than causal, for the state knows no exceptions."""
        special = ctx.mask.documents_BS is not None or ctx.mask.prefix_B is not None or not ctx.mask.causal
        size = tokens if special else self.chunk
        return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def _allowed(self, part: slice, ctx: Context) -> torch.Tensor:
        """Which keys of a chunk its queries see: (1 or B, 1, 1, C, C)."""
        tokens = part.stop - part.start
        if ctx.mask.documents_BS is not None or ctx.mask.prefix_B is not None or not ctx.mask.causal:
            return ctx.mask.dense(tokens, tokens, ctx.positions_BT.device)[:, :, None]
        return torch.ones(1, 1, 1, tokens, tokens, dtype=torch.bool, device=ctx.positions_BT.device).tril()

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> LinearState:
        """Sums over nothing, in fp32 whatever the dtype: they grow with every token. `max_length` costs nothing."""
        s_BGEF = torch.zeros(batch, self.n_kv_head, self.head_dim, self.head_dim, device=device)
        return LinearState(s_BGEF, s_BGEF[..., 0].clone())


def _attend(
    turned_q: torch.Tensor,
    q: torch.Tensor,
    turned_k: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ahead: tuple[torch.Tensor, torch.Tensor],
    allowed: torch.Tensor,
) -> torch.Tensor:
    """y_BGRCF of a chunk: its own keys under the mask, everything before it through the sums `ahead`."""
    s_BGEF, z_BGE = ahead
    weights_BGRCC = (turned_q @ turned_k[:, :, None].mT).masked_fill(~allowed, 0.0)
    sizes_BGRCC = (q @ k[:, :, None].mT).masked_fill(~allowed, 0.0)
    numerator = weights_BGRCC @ v[:, :, None] + turned_q @ s_BGEF[:, :, None].to(turned_q.dtype)
    denominator = sizes_BGRCC.sum(-1, keepdim=True) + q @ z_BGE[:, :, None, :, None].to(q.dtype)
    return numerator / denominator.clamp(min=1e-6)  # only queries of padding see nothing at all


def _added(
    sums: tuple[torch.Tensor, torch.Tensor], turned_k: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, z) with the keys and values (B, G, tokens, E) added."""
    s_BGEF, z_BGE = sums
    return s_BGEF + turned_k.mT @ v, z_BGE + k.sum(2)
