"""Hugging Face transformers: the class of its own that computes our model, loaded from our export.

Training: `model(tokens, labels=...)`, the loss inside of the model, `torch.compile` over all of it; attention by SDPA.
Decoding: `generate` with the growing cache or the static one (compiled where asked: transformers compiles its step by
itself on a GPU, and on a CPU when told to).

B batch, T time (tokens).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sky_core.bench.contenders.base import Contender, PeerTraining, Prompts, cast
from sky_core.hf import export
from sky_core.tokenizer.byte import ByteTokenizer

if TYPE_CHECKING:
    from sky_core.model.decoder import DecoderLM


class Transformers(Contender):
    """`AutoModelForCausalLM` of our exported weights."""

    name: ClassVar = "transformers"
    libraries: ClassVar = ("transformers", "transformers.modeling_utils", "transformers.models.auto.modeling_auto")
    distributions: ClassVar = ("transformers",)
    install: ClassVar = "pip install 'sky-core[bench]'"

    def __init__(self, model: DecoderLM, device: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        super().__init__(model, device)
        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            # The ids are what counts here, so any tokenizer that fits may lie beside the weights.
            path = export(model, ByteTokenizer(end_of_text=False), Path(folder) / "model")
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        self.model: Any = loaded.to(device)

    def _loss(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(
            input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT, use_cache=False
        ).loss
        return loss

    def prepare_training(self, precision: str, *, compile: bool) -> None:
        self.precision = precision
        self.model.train()
        self.training = PeerTraining(self.model, torch.compile(self._loss) if compile else self._loss, self.autocast)

    def loss(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> float:
        with torch.no_grad(), self.autocast():
            return float(self._loss(tokens_BT, targets_BT))

    def train_step(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> None:
        self.training.step(tokens_BT, targets_BT)

    def prepare_decoding(self, precision: str, *, compile: bool, batch: int, length: int) -> None:
        cast(self.model, precision)
        self.options = self._cache(compile)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def generate(self, prompts: Prompts, n: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        # As its documentation asks for: padded on the left, the padding masked.
        ids_BT = torch.tensor([[0] * (longest - len(row)) + list(row) for row in prompts], device=self.device)
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=self.device)
        with torch.inference_mode():
            out_BT = self.model.generate(
                ids_BT, attention_mask=mask_BT, max_new_tokens=n, do_sample=False, **self.options
            )
        return [row[longest:] for row in out_BT.tolist()]

    def _cache(self, compile: bool) -> dict[str, Any]:
        """The options of `generate` that choose the cache: none, it grows."""
        return {}


class TransformersStatic(Transformers):
    """The same with the preallocated cache."""

    name: ClassVar = "transformers-static"

    def _cache(self, compile: bool) -> dict[str, Any]:
        if not compile:
            return {"cache_implementation": "static", "disable_compile": True}
        from transformers.generation import CompileConfig

        config: Any = CompileConfig()
        config._compile_all_devices = True  # its own switch for a CPU
        return {"cache_implementation": "static", "compile_config": config}
