"""A GPT in one file: the whole model, every choice made, nothing hidden.

This is the decoder of "Attention Is All You Need" (Vaswani et al. 2017, arXiv:1706.03762; section numbers below are
that paper's) with the changes of GPT-2 (Radford et al. 2019, section 2.3):

  - no encoder, so no cross-attention: each block has one attention and one feed-forward part (figure 1, right);
  - LayerNorm stands before each part, not after it, and once more at the end of the stack;
  - positions are a learned table, where section 3.5 adds sines and cosines;
  - GELU, where section 3.3 has ReLU;
  - projections back into the residual stream start smaller by sqrt(2 n_layer).

It computes what `sky_core.model.decoder` computes with the same choices (held to that by a test), names its parameters
likewise, and needs torch alone:

    model = GPT(Config(vocab_size=65, max_length=64, n_layer=4, n_head=4, d_model=128))
    loss = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])      # train it with any optimizer
    model.generate(prompt_BT, 100)

Shapes: B batch, T time (tokens), D model width, H heads, E = D / H width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Config:
    """The dials, set to GPT-2 small. The paper's base model: n_layer 6, n_head 8, d_model 512."""

    vocab_size: int
    max_length: int = 1024  # the context: most tokens the model can look back on
    n_layer: int = 12  # N in the paper
    n_head: int = 12  # h
    d_model: int = 768  # d_model; the feed-forward part is 4 times as wide (section 3.3)
    dropout: float = 0.0  # section 5.4; 0 suits data that is seen once
    bias: bool = True  # biases in linear layers and norms; leaving them out is a bit better and faster

    def __post_init__(self) -> None:
        if self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} must be a multiple of n_head {self.n_head}")


class SelfAttention(nn.Module):
    """Section 3.2: every token asks (query), is found (key) and tells (value), in several heads at once."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.v_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        # Section 3.2.2: the D features split into H heads, each of which attends by itself.
        q_BHTE = self.q_proj(x_BTD).view(B, T, self.n_head, -1).transpose(1, 2)
        k_BHTE = self.k_proj(x_BTD).view(B, T, self.n_head, -1).transpose(1, 2)
        v_BHTE = self.v_proj(x_BTD).view(B, T, self.n_head, -1).transpose(1, 2)

        # Section 3.2.1, equation 1. The scale keeps the scores' variance near 1 whatever the width of a head.
        scores_BHTT = q_BHTE @ k_BHTE.transpose(-2, -1) / math.sqrt(q_BHTE.shape[-1])
        # Section 3.2.3: a token may not look ahead, or it would just copy the answer.
        future_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(diagonal=1)
        weights_BHTT = scores_BHTT.masked_fill(future_TT, -torch.inf).softmax(dim=-1)
        weights_BHTT = F.dropout(weights_BHTT, self.dropout, self.training)
        y_BHTE = weights_BHTT @ v_BHTE

        return self.o_proj(y_BHTE.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Section 3.3: each token thinks for itself, four times as wide."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, 4 * config.d_model, bias=config.bias)
        self.down_proj = nn.Linear(4 * config.d_model, config.d_model, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTD)))


class Block(nn.Module):
    """Section 3.1 as GPT-2 has it: talk to the others, then think; each adds to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.self_attn(self.input_layernorm(x_BTD)))
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD)))


class GPT(nn.Module):
    """Tokens in, a distribution over the next token out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_length, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, bias=config.bias)
        # Section 3.4: the head shares the weight of the embedding, so there is no parameter for it here.
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02²), projections into the residual stream N(0, 0.02² / (2 n_layer)); norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif not name.endswith("norm.weight"):  # nn.LayerNorm starts at 1
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """logits_BTV: at each position, the scores of the token that follows it."""
        T = tokens_BT.shape[1]
        if self.config.max_length < T:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.max_length}")
        x_BTD = self.embed_tokens(tokens_BT) + self.embed_positions.weight[:T]
        x_BTD = self.dropout(x_BTD)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.norm(x_BTD) @ self.embed_tokens.weight.T

    def loss(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of the targets in nats per token; -100 carries no loss."""
        return F.cross_entropy(self(tokens_BT).flatten(0, 1), targets_BT.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(
        self, tokens_BT: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> torch.Tensor:
        """`tokens_BT` with `max_new_tokens` more, each drawn from the model's distribution (temperature 0: the best).

        The context slides: beyond `max_length` the oldest tokens are forgotten.
        """
        for _ in range(max_new_tokens):
            logits_BV = self(tokens_BT[:, -self.config.max_length :])[:, -1]
            if top_k is not None:
                kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
                logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
            if temperature == 0:
                next_B1 = logits_BV.argmax(dim=-1, keepdim=True)
            else:
                next_B1 = torch.multinomial((logits_BV / temperature).softmax(dim=-1), num_samples=1)
            tokens_BT = torch.cat((tokens_BT, next_B1), dim=1)
        return tokens_BT
