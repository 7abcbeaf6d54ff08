"""Ours: the engine that the trainer drives, and the token loop that `sky sample` drives.

B batch, T time (tokens).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from sky_core import native
from sky_core.bench.contenders.base import ADAMW, CLIP, Contender, Prompts, cast
from sky_core.bench.shape import id_tokenizer
from sky_core.components.generation import Sample
from sky_core.components.optimization import AdamW
from sky_core.data.dataset import Batch
from sky_core.generation.decode import generate_tokens
from sky_core.generation.generator import Generator
from sky_core.quantization import FORMATS, QuantizedLinear, quantize_
from sky_core.training.engine import LocalEngine, Step
from sky_core.training.objective import NextToken

if TYPE_CHECKING:
    from sky_core.model.decoder import DecoderLM


class Ours(Contender):
    """The decoder of core."""

    name: ClassVar = "ours"

    def __init__(self, model: DecoderLM, device: str) -> None:
        super().__init__(model, device)
        self.model: DecoderLM = copy.deepcopy(model).to(device)

    def prepare_training(self, precision: str, *, compile: bool) -> None:
        self.precision = precision
        self.engine = LocalEngine()
        self.engine.setup(precision, compile=compile)
        if compile and self.device == "cpu":
            native.load()
        self.engine.device = torch.device(self.device)
        self.engine.prepare(Step(self.model, NextToken()), AdamW(**ADAMW).build)

    def loss(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> float:
        with torch.no_grad(), self.autocast(), torch.compiler.set_stance("force_eager"):
            total = self.model.nll(self.model.hidden(tokens_BT), targets_BT)
        return float(total) / targets_BT.numel()

    def accumulate(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> None:
        """Forward and backward, as in each micro-batch of a step."""
        batch = Batch(tokens_BT, targets_BT)
        loss = self.engine.loss_of(batch, last=True)
        self.engine.backward(loss.total / batch.n_targets())

    def train_step(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> None:
        self.accumulate(tokens_BT, targets_BT)
        self.engine.clip(CLIP)
        self.engine.update(skip=False)

    def prepare_decoding(self, precision: str, *, compile: bool, batch: int, length: int) -> None:
        """Also in "int8" and "int4"."""
        self.precision = "fp32"  # the weights themselves are cast
        if precision in FORMATS and not any(isinstance(one, QuantizedLinear) for one in self.model.modules()):
            quantize_(self.model, precision)
        cast(self.model, "bf16" if precision in FORMATS else precision)
        if compile:
            self.model.compile_decoding()
        self.tokenizer = id_tokenizer(self.model.vocab_size)

    def generate(self, prompts: Prompts, n: int) -> list[list[int]]:
        greedy = Sample(temperature=0.0)
        found = generate_tokens(self.model, self.tokenizer, prompts, sampler=greedy, max_new_tokens=n)
        return [generation.tokens for generation in found]

    def serve(self, requests: Sequence[tuple[Sequence[int], int]], rows: int) -> list[list[int]]:
        """What follows each (prompt, number of tokens), from a `Generator` of `rows` places."""
        longest = max(len(prompt) + n for prompt, n in requests)
        generator = Generator(self.model, self.tokenizer, rows=rows, max_length=longest)
        greedy = Sample(temperature=0.0)
        ids = [generator.submit(prompt, max_new_tokens=n, sampler=greedy) for prompt, n in requests]
        found = generator.run()
        return [found[one][0].tokens for one in ids]

    def _head_is_embedding(self) -> bool:
        return self.model.lm_head is None
