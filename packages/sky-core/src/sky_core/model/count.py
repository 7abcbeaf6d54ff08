"""Parameters, FLOPs and cache bytes of a model, by the formulas of the field.

    training FLOPs per token = 6 (N_body + N_head) + 12 h d_h Σ_layers S

Kaplan et al. 2020 (arXiv:2001.08361, section 2.1) with the causal half of attention: 2 FLOPs per weight and token
forward, 4 backward; QKᵀ and AV are 2 S h d_h each per layer, S the tokens that a token sees on average: T / 2, or
W (1 - W / 2T) where only the newest W < T are seen. N_body leaves out experts that a token does not pass. N_head = V D
whether the head is tied or not (it multiplies either way), and reading the embedding table costs nothing.

h heads, d_h width of a head, T tokens, W window, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def n_parameters(model: nn.Module, embeddings: Iterable[nn.Module]) -> dict[str, int]:
    """{"total", "embedding", "body"}: distinct parameters, those of `embeddings`, and the rest."""

    def count(modules: Iterable[nn.Module]) -> int:
        distinct = {parameter for module in modules for parameter in module.parameters()}
        return sum(parameter.numel() for parameter in distinct)

    total, embedding = count([model]), count(embeddings)
    return {"total": total, "embedding": embedding, "body": total - embedding}


def idle_parameters(model: nn.Module) -> int:
    """Parameters that a token does not pass: those of the experts it does not go to."""
    return sum(getattr(module, "idle_parameters", 0) for module in model.modules())


def flops_per_token(
    body: int, head: int, n_head: int, head_dim: int, sequence_length: int, windows: Iterable[int | None]
) -> float:
    """Training FLOPs per token at `sequence_length`; `body` and `head` are numbers of parameters that a token passes
    (`body` without the idle ones), `windows` the newest tokens that each attention layer sees (None: all)."""
    length = float(sequence_length)
    seen = (min(window or length, length) for window in windows)
    return 6.0 * (body + head) + 12.0 * n_head * head_dim * sum(number * (1 - number / (2 * length)) for number in seen)


def kv_bytes_per_token(n_layer: int, n_kv_head: int, head_dim: int, bytes_per_number: int) -> int:
    """Bytes of keys and values that one token leaves in the cache."""
    return 2 * n_layer * n_kv_head * head_dim * bytes_per_number
