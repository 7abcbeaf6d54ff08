"""The decoder: token embedding, position encoding, a stack of residual blocks, a final norm, a head.

Vaswani et al. 2017 (arXiv:1706.03762), figure 1, right half without the cross-attention, as GPT-2 uses it. Every part
is chosen in `sky_core.components.model.Decoder` and may differ from layer to layer; `sky_core.model.nano` is the same
model in one file with every choice made.

Names follow Hugging Face's Llama without its leading `model.`: `embed_tokens`, `layers.0.self_attn.q_proj`,
`layers.0.mlp.up_proj`, `norm`, `lm_head` (absent when the head is tied to the embedding), `mtp.0` (multi-token
prediction, `sky_core.model.mtp`).

B batch, T time (tokens), D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from sky_core import native
from sky_core.errors import UserError
from sky_core.model import count
from sky_core.model.cache import Cache
from sky_core.model.context import Context
from sky_core.model.init import init_weights
from sky_core.model.kernels import WITH_FLASH
from sky_core.model.language_model import LanguageModel
from sky_core.model.loss import Chunk, compiled_chunk, cross_entropy_of_head, linear_cross_entropy
from sky_core.model.mtp import MultiTokenModule
from sky_core.model.mup import attention_scale, lr_scale
from sky_core.model.position import PositionEncoding
from sky_core.model.recompute import recomputed, selective_in_compiled
from sky_core.slots import AttentionSpec, LayerSpec

if TYPE_CHECKING:
    from sky_core.components.model import Decoder
    from sky_core.model.decoding import CompiledStep


class DecoderLM(LanguageModel):
    """A decoder-only language model, built part by part from its configuration."""

    def __init__(self, config: Decoder, vocab_size: int) -> None:
        super().__init__()
        rows = config.vocab_size or vocab_size
        if rows < vocab_size:
            raise UserError(
                f"model.vocab_size: {rows} rows cannot hold the tokenizer's {vocab_size} ids; set {vocab_size} or more"
            )
        self.config = config
        self.vocab_size, self.max_length, self.n_layer, self.n_mtp = (
            rows,
            config.max_length,
            config.n_layer,
            config.n_mtp,
        )

        self.embed_tokens = nn.Embedding(rows, config.d_model)
        self.embedding_norm = config.norm.build(config.d_model) if config.embedding_norm else None
        self.positions = nn.ModuleList(
            position.build(config.d_model, config.width_of_head, config.max_length, config.n_head)
            for position in config.position
        )
        self.dropout = nn.Dropout(config.dropout)
        kernel = config.kernel.build()
        built = [self._build_layer(i, kernel) for i in range(config.n_layer + config.n_mtp)]
        self.layers = nn.ModuleList(block for block, _, _ in built[: config.n_layer])
        self.norm = config.norm.build(config.d_model) if config.block.final_norm else nn.Identity()
        self.mtp = nn.ModuleList(
            MultiTokenModule(self._layer_spec(i), built[i][0]) for i in range(config.n_layer, len(built))
        )
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, rows, bias=False)

        # Plain tuples: these modules are registered where they belong, inside their blocks.
        self._attentions, self._memories = tuple(one for _, one, _ in built), tuple(one for _, _, one in built)
        self._encodings = tuple(module for module in self.modules() if isinstance(module, PositionEncoding))
        self._chunk: Chunk | None = None
        self._evaluated: torch.Size | None = None
        self._decoding: CompiledStep | None = None
        init_weights(
            self,
            config.initializer_range,
            config.n_layer,
            width_ratio=config.width_ratio,
            zero_residual=config.zero_residual,
        )

    def _build_layer(
        self, i: int, kernel: Callable[..., torch.Tensor]
    ) -> tuple[nn.Module, nn.Module, nn.Module | None]:
        """(block, its attention, its memory) of layer `i`; parts are tiled over the depth."""
        config, spec = self.config, self._layer_spec(i)
        base = config.mup and config.mup.base_head_dim
        attention = config.attention[i % len(config.attention)].build(
            AttentionSpec(
                **vars(spec),
                position=self.positions[i % len(self.positions)].in_layers(),
                kernel=kernel,
                scale=attention_scale(spec.head_dim, base or spec.head_dim),
                qk_norm=config.qk_norm,
            )
        )
        feedforward = config.feedforward[i % len(config.feedforward)].build(spec)
        part = config.memory[i % len(config.memory)]
        memory = None if part is None else part.build(spec)
        return config.block.build(spec, attention, feedforward, memory), attention, memory

    def _layer_spec(self, layer: int) -> LayerSpec:
        config = self.config
        return LayerSpec(
            vocab_size=self.vocab_size,
            d_model=config.d_model,
            n_head=config.n_head,
            n_kv_head=config.n_kv_head or config.n_head,
            head_dim=config.width_of_head,
            layer=layer,
            n_layer=config.n_layer,
            max_length=config.max_length,
            dropout=config.dropout,
            bias=config.bias,
            initializer_range=config.initializer_range / config.width_ratio**0.5,
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
        x_BTD = self._enter(ctx)
        states = [x_BTD]
        if collect is not None and "attention" in collect:
            collect["attention"] = {}
        with self._pass(ctx, x_BTD):
            for layer in self.layers:
                x_BTD = self._run(layer, ctx, x_BTD)
                if collect is not None and "hidden_states" in collect:
                    states.append(x_BTD)
        if collect is not None and "hidden_states" in collect:
            collect["hidden_states"] = states
        return self.norm(x_BTD)

    def mtp_hidden(
        self,
        depth: int,
        hidden_BTD: torch.Tensor,
        tokens_BT: torch.Tensor,
        *,
        positions_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        valid_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
        collect: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        ctx = Context.begin(
            tokens_BT,
            self.max_length,
            positions_BT=positions_BT,
            documents_BT=documents_BT,
            valid_BT=valid_BT,
            cache=cache,
            collect=collect,
        )
        embedding_BTD = self._embed(tokens_BT)
        with self._pass(ctx, embedding_BTD):
            return self._run(self.mtp[depth], ctx, hidden_BTD, embedding_BTD)

    def step(self, tokens_B: torch.Tensor, cache: Cache, *, idle: int = 0) -> torch.Tensor:
        if self._decoding is None:
            return super().step(tokens_B, cache, idle=idle)
        if self.context_hooks:
            raise UserError("compiled decoding knows no key/value prefixes: detach the adapter, or do not compile")
        return self._decoding(tokens_B, cache, idle)

    def rows_of_step(self, rows: int) -> int:
        return rows if self._decoding is None else 1 << (rows - 1).bit_length()  # few graphs: 1, 2, 4, 8 ... rows

    def compile_decoding(self, **options: Any) -> None:
        from sky_core.model.decoding import CompiledStep  # and with it the compiler

        self._decoding = CompiledStep(self, self._next_logits, **options)

    def _next_logits(self, ctx: Context) -> torch.Tensor:
        """logits_BV behind the last token of a pass that only fills the cache."""
        x_BTD = self._enter(ctx)
        self._share(ctx, x_BTD)
        for layer in self.layers:
            x_BTD = layer(x_BTD, ctx)
        return self.logits(self.norm(x_BTD[:, -1:]))[:, 0]

    def _enter(self, ctx: Context) -> torch.Tensor:
        """What enters the first layer."""
        x_BTD = self._embed(ctx.tokens_BT)
        for position in self.positions:
            x_BTD = position.embed(x_BTD, ctx)
        return self.dropout(x_BTD)

    def _embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embed_tokens(tokens_BT)
        if self.config.scale_embeddings:
            x_BTD = x_BTD * torch.tensor(self.config.d_model**0.5, dtype=x_BTD.dtype)
        return x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)

    def _share(self, ctx: Context, embedding_BTD: torch.Tensor) -> None:
        """Put into the context what every layer reads."""
        ctx.embedding_BTD = embedding_BTD
        for encoding in self._encodings:
            encoding.prepare(ctx)

    @contextmanager
    def _pass(self, ctx: Context, embedding_BTD: torch.Tensor) -> Iterator[None]:
        """What stands around the layers of every pass: shared tables before, reported losses and the cache behind."""
        self._share(ctx, embedding_BTD)
        with self._compilation(ctx) if self._compiled else nullcontext():
            yield
        if ctx.collect is not None:
            losses = ctx.collect.setdefault("losses", {})
            for name, value in ctx.losses.items():
                losses[name] = losses[name] + value if name in losses else value
        if ctx.cache is not None:
            batch, time = ctx.tokens_BT.shape
            ctx.cache.advance([time] * batch if ctx.valid_BT is None else ctx.valid_BT.sum(1).tolist())

    @contextmanager
    def _compilation(self, ctx: Context) -> Iterator[None]:
        """When compiled layers may compile once more: in training always; without gradients for the shape that comes
        first, so that a short last batch runs as it is; with a cache never, whose every step has another shape."""
        shape, training = ctx.tokens_BT.shape, torch.is_grad_enabled()
        if ctx.cache is None and not training and self._evaluated is None:
            self._evaluated = shape
        with ExitStack() as stack:
            if ctx.cache is not None:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            elif not training and shape != self._evaluated:
                stack.enter_context(torch.compiler.set_stance("eager_on_recompile"))
            if self.activation_checkpointing == "selective":
                stack.enter_context(selective_in_compiled())
            yield

    def _run(self, module: nn.Module, ctx: Context, *inputs: torch.Tensor) -> torch.Tensor:
        """`module(*inputs, ctx)`; what its backward pass needs is kept, or computed again."""
        if ctx.cache is not None:
            return module(*inputs, ctx)
        policy = self.activation_checkpointing if torch.is_grad_enabled() else "none"
        if policy == "none" or (policy == "selective" and self._compiled):
            own = replace(ctx, losses={})  # as every layer's, so that compiled layers are one graph
            x_BTD, losses = module(*inputs, own), own.losses
        else:
            x_BTD, losses = recomputed(policy, module, ctx, *inputs)
        for name, value in losses.items():
            ctx.add_loss(name, value)
        return x_BTD

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        hidden_BTD = self._scaled(hidden_BTD)
        if self.lm_head is None:
            logits_BTV = F.linear(hidden_BTD, self.embed_tokens.weight)
        else:
            logits_BTV = self.lm_head(hidden_BTD)
        cap = self.config.logit_softcap
        return logits_BTV if cap is None else (logits_BTV / cap).tanh() * cap

    def nll(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        if self.lm_head is not None and self.lm_head._forward_hooks:
            # An adapter sits on the head: its output, not its weight, gives the logits.
            return cross_entropy_of_head(self.logits, self.vocab_size, hidden_BTD, targets_BT)
        weight_VD = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        cap = self.config.logit_softcap
        return linear_cross_entropy(self._scaled(hidden_BTD), weight_VD, targets_BT, softcap=cap, chunk=self._chunk)

    def _scaled(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What the head reads: muP divides the logits by the width ratio."""
        return hidden_BTD if self.config.mup is None else hidden_BTD / self.config.width_ratio

    def lr_scale(self) -> dict[str, float]:
        return {} if self.config.mup is None else lr_scale(self, self.config.width_ratio)

    def new_cache(self, batch: int, max_length: int | None = None) -> Cache:
        """As `LanguageModel.new_cache`; in the dtype of the autocast that is on, else of the weights. For compiled
        decoding it may hold some tokens more."""
        return self._new_cache(range(self.n_layer), batch, max_length)

    def new_mtp_cache(self, depth: int, batch: int, max_length: int | None = None) -> Cache:
        return self._new_cache([self.n_layer + depth], batch, max_length)

    def _new_cache(self, which: Collection[int], batch: int, max_length: int | None) -> Cache:
        length = self.max_length if max_length is None else max_length
        if length > self.max_length:
            raise ValueError(f"a cache of {length} tokens, but the model's context is max_length={self.max_length}")
        if self._decoding is not None:  # a graph serves caches of one length
            length = min(self._decoding.room_for(length), self.max_length)
        weight = self.embed_tokens.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        layers, memories = (
            [
                module.new_cache(batch, length, weight.device, dtype) if module is not None and i in which else None
                for i, module in enumerate(modules[: max(which) + 1])
            ]
            for modules in (self._attentions, self._memories)
        )
        return Cache([0] * batch, length, layers, memories)

    def use_operators(self) -> None:
        if native.load() and native.has_flash:
            for module in self.modules():
                kernel = getattr(module, "kernel", None)
                if callable(kernel) and kernel in WITH_FLASH:
                    module.kernel = WITH_FLASH[kernel]

    @property
    def _compiled(self) -> bool:
        return self._chunk is not None

    def compile_layers(self, **options: Any) -> None:
        for layer in [*self.layers, *self.mtp]:
            layer.compile(**options)
        self._chunk = compiled_chunk(**options)

    def n_parameters(self) -> dict[str, int]:
        tables = [module for module in self.modules() if isinstance(module, nn.Embedding)]
        return count.n_parameters(self, [*tables, *self.positions, *([] if self.lm_head is None else [self.lm_head])])

    def flops_per_token(self, sequence_length: int) -> float:
        config = self.config
        body = self.n_parameters()["body"] - count.idle_parameters(self)
        head = self.vocab_size * config.d_model * (1 + config.n_mtp)
        windows = [getattr(attention, "window", None) for attention in self._attentions]
        return count.flops_per_token(body, head, config.n_head, config.width_of_head, sequence_length, windows)
