"""The decoder: token embedding, position encoding, a stack of residual blocks, a final norm, a head.

Vaswani et al. 2017 (arXiv:1706.03762), figure 1, right half without the cross-attention, as GPT-2 uses it. Every part
is chosen in `sky_core.components.model.Decoder` and may differ from layer to layer; `sky_core.model.nano` is the same
model in one file with every choice made.

Names follow Hugging Face's Llama without its leading `model.`: `embed_tokens`, `layers.0.self_attn.q_proj`,
`layers.0.mlp.up_proj`, `norm`, `lm_head` (absent when the head is tied to the embedding).

B batch, T time (tokens), D model width, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sky_core.model import count
from sky_core.model.cache import Cache
from sky_core.model.context import Context
from sky_core.model.init import init_weights
from sky_core.model.language_model import LanguageModel
from sky_core.model.loss import cross_entropy_of_head, linear_cross_entropy
from sky_core.model.position import PositionEncoding
from sky_core.slots import AttentionSpec, LayerSpec

if TYPE_CHECKING:
    from sky_core.components.model import Decoder


class DecoderLM(LanguageModel):
    """A decoder-only language model, built part by part from its configuration."""

    def __init__(self, config: Decoder, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.max_length, self.n_layer = vocab_size, config.max_length, config.n_layer

        self.embed_tokens = nn.Embedding(vocab_size, config.d_model)
        self.positions = nn.ModuleList(
            position.build(config.d_model, config.width_of_head, config.max_length) for position in config.position
        )
        self.dropout = nn.Dropout(config.dropout)
        kernel = config.kernel.build()
        layers, attentions, memories = [], [], []
        for i in range(config.n_layer):
            spec = self._layer_spec(i)
            position = self.positions[i % len(self.positions)].in_layers()
            attention = config.attention[i % len(config.attention)].build(
                AttentionSpec(**vars(spec), position=position, kernel=kernel, qk_norm=config.qk_norm)
            )
            feedforward = config.feedforward[i % len(config.feedforward)].build(spec)
            memory = config.memory[i % len(config.memory)]
            memory = None if memory is None else memory.build(spec)
            layers.append(config.block.build(spec, attention, feedforward, memory))
            attentions.append(attention)
            memories.append(memory)
        self.layers = nn.ModuleList(layers)
        self.norm = config.norm.build(config.d_model) if config.block.final_norm else nn.Identity()
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, vocab_size, bias=False)

        # Plain tuples: these modules are registered where they belong, inside their blocks.
        self._attentions, self._memories = tuple(attentions), tuple(memories)
        self._encodings = tuple(module for module in self.modules() if isinstance(module, PositionEncoding))
        self._compiled = False
        init_weights(self, config.initializer_range, config.n_layer)

    def _layer_spec(self, layer: int) -> LayerSpec:
        config = self.config
        return LayerSpec(
            d_model=config.d_model,
            n_head=config.n_head,
            n_kv_head=config.n_kv_head or config.n_head,
            head_dim=config.width_of_head,
            layer=layer,
            n_layer=config.n_layer,
            max_length=config.max_length,
            dropout=config.dropout,
            bias=config.bias,
            initializer_range=config.initializer_range,
            norm=config.norm.build,
        )

    def hidden(
        self,
        tokens_BT: torch.Tensor,
        *,
        positions_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        valid_BT: torch.Tensor | None = None,
        prefix_B: torch.Tensor | None = None,
        cache: Cache | None = None,
        collect: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        ctx = Context.begin(
            tokens_BT,
            self.max_length,
            positions_BT=positions_BT,
            documents_BT=documents_BT,
            valid_BT=valid_BT,
            prefix_B=prefix_B,
            cache=cache,
            collect=collect,
        )
        for hook in self.context_hooks:
            hook(ctx)
        x_BTD = self.embed_tokens(tokens_BT)
        for position in self.positions:
            x_BTD = position.embed(x_BTD, ctx)
        x_BTD = self.dropout(x_BTD)
        for encoding in self._encodings:
            encoding.prepare(ctx)

        states = [x_BTD]
        if collect is not None and "attention" in collect:
            collect["attention"] = {}
        recompute = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        # Each step of decoding has another shape, and compiling it would cost far more than it saves.
        eager = self._compiled and cache is not None
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            for layer in self.layers:
                x_BTD = self._recomputed(layer, x_BTD, ctx) if recompute else layer(x_BTD, ctx)
                if collect is not None and "hidden_states" in collect:
                    states.append(x_BTD)
        if collect is not None:
            collect["losses"] = ctx.losses
            if "hidden_states" in collect:
                collect["hidden_states"] = states
        if cache is not None:
            batch, time = tokens_BT.shape
            cache.advance([time] * batch if valid_BT is None else valid_BT.sum(1).tolist())
        return self.norm(x_BTD)

    def _recomputed(self, layer: nn.Module, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        """`layer(x_BTD, ctx)` that keeps only its input; the second run must not add its losses a second time."""

        def run(x_BTD: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            own = replace(ctx, losses={})
            return layer(x_BTD, own), own.losses

        x_BTD, losses = checkpoint(run, x_BTD, use_reentrant=False)
        for name, value in losses.items():
            ctx.add_loss(name, value)
        return x_BTD

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        if self.lm_head is None:
            return F.linear(hidden_BTD, self.embed_tokens.weight)
        return self.lm_head(hidden_BTD)

    def nll(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        if self.lm_head is not None and self.lm_head._forward_hooks:
            # An adapter sits on the head: its output, not its weight, gives the logits.
            return cross_entropy_of_head(self.lm_head, self.vocab_size, hidden_BTD, targets_BT)
        weight_VD = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return linear_cross_entropy(hidden_BTD, weight_VD, targets_BT)

    def new_cache(self, batch: int, max_length: int | None = None) -> Cache:
        """As `LanguageModel.new_cache`; in the dtype of the autocast that is on, else of the weights."""
        length = self.max_length if max_length is None else max_length
        if length > self.max_length:
            raise ValueError(f"a cache of {length} tokens, but the model's context is max_length={self.max_length}")
        weight = self.embed_tokens.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        layers, memories = (
            [module and module.new_cache(batch, length, weight.device, dtype) for module in modules]
            for modules in (self._attentions, self._memories)
        )
        return Cache([0] * batch, length, layers, memories)

    def compile_layers(self, **options: Any) -> None:
        for layer in self.layers:
            layer.compile(**options)
        self._compiled = True

    def n_parameters(self) -> dict[str, int]:
        head = [] if self.lm_head is None else [self.lm_head]
        return count.n_parameters(self, [self.embed_tokens, *self.positions, *head])

    def flops_per_token(self, sequence_length: int) -> float:
        config = self.config
        head = self.vocab_size * config.d_model
        shape = (config.n_layer, config.n_head, config.width_of_head)
        return count.flops_per_token(self.n_parameters()["body"], head, *shape, sequence_length)
