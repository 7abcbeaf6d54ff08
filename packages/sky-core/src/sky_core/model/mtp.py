"""Multi-token prediction: small modules behind the stack that predict the token after the next, and so on.

DeepSeek-V3 (arXiv:2412.19437), section 2.2, equations 21 to 25. Module k = 1, 2, ... sees at position i what the stack
(or module k - 1) made of the tokens up to i, and the token that follows these:

    h'_i = M_k [norm_e(E[t_(i+k)]); norm_h(h_i^(k-1))]      (concatenated in the order of the released weights)
    h^k_i = norm(block_k(h'_1 .. h'_i)),   p(t_(i+k+1)) = softmax(W_head h^k_i)

Embedding and head are the model's own. Training on them as well (`objective: multi_token`) gives each position a denser
signal; decoding may drop the modules, or let them draft what the model then verifies (`sky_core.generation`).

Where we differ: h^0 is the state after the model's final norm, as inference engines feed the released weights (the
paper does not say); the loss is a sum over tokens that is divided by the number of next-token targets.

B batch, T time (tokens), D model width.
"""

from __future__ import annotations

import torch
from torch import nn

from sky_core.model.context import Context
from sky_core.slots import LayerSpec


class MultiTokenModule(nn.Module):
    """One further prediction, from the state before it and the token that has come since."""

    def __init__(self, spec: LayerSpec, block: nn.Module) -> None:
        super().__init__()
        self.enorm = spec.norm(spec.d_model)
        self.hnorm = spec.norm(spec.d_model)
        self.eh_proj = nn.Linear(2 * spec.d_model, spec.d_model, bias=False)
        self.layer = block
        self.norm = spec.norm(spec.d_model)

    def forward(self, hidden_BTD: torch.Tensor, embedding_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        joined = torch.cat((self.enorm(embedding_BTD), self.hnorm(hidden_BTD)), dim=-1)
        return self.norm(self.layer(self.eh_proj(joined), ctx))
