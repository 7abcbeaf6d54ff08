"""Ours: the engine that the trainer drives, and the token loop that `sky sample` drives.

B batch, T time (tokens), V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from sky_core.bench.contenders.base import ADAMW, CLIP, Contender, Prompts, cast
from sky_core.bench.shape import id_tokenizer
from sky_core.components.generation import Sample
from sky_core.components.optimization import AdamW
from sky_core.data.dataset import Batch
from sky_core.generation.decode import generate_tokens
from sky_core.generation.generator import Generator
from sky_core.model.language_model import LanguageModel
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
            self.model.use_operators()
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

    def error_of_compiled_steps(self, rows: int, prompt: int, length: int) -> float:
        """How far the logits of compiled steps are from those of uncompiled ones with the same weights: the root of
        the sum of squared differences over the sum of squares.

        Both are given the same random texts of up to `length` tokens, token by token behind the first `prompt` of them.
        """
        generator = torch.Generator().manual_seed(3)
        with torch.inference_mode():
            tokens_TB = torch.randint(self.vocab_size, (length, rows), generator=generator).to(self.device)
            ends_B1 = prompt - torch.arange(rows, device=self.device)[:, None] % prompt  # rows of several lengths
            valid_BT = torch.arange(prompt, device=self.device) < ends_B1
            squares = torch.zeros(2, dtype=torch.float64, device=self.device)
            compiled, plain = (self.model.new_cache(rows, length) for _ in range(2))
            for cache in (compiled, plain):
                self.model.hidden(tokens_TB[:prompt].T, valid_BT=valid_BT, cache=cache)
            for tokens_B in tokens_TB[prompt:]:
                expected_BV = LanguageModel.step(self.model, tokens_B, plain).double()
                error_BV = self.model.step(tokens_B, compiled) - expected_BV
                squares += torch.stack([error_BV.square().sum(), expected_BV.square().sum()])
        error, size = squares.sqrt().tolist()
        return float(error / size)

    def _head_is_embedding(self) -> bool:
        return self.model.lm_head is None
