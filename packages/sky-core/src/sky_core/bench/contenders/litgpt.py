"""litgpt: `litgpt.GPT` with our weights under its names.

Training as its pretraining recipe: `torch.compile(model)`, `chunked_cross_entropy` of the logits. Decoding: its
`generate` for one prompt, its `batched_generate_fn` for several.

litgpt 0.5 pins an older huggingface-hub than transformers 5 needs; what is used here works with the newer one, so it is
installed without its dependencies.

B batch, T time (tokens).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sky_core.bench.contenders.base import Contender, PeerTraining, Prompts, cast
from sky_core.components.attention import Full
from sky_core.components.layers import RMSNorm, SwiGLU
from sky_core.components.position import Rope
from sky_core.errors import UserError
from sky_core.hf.fit import resolved

if TYPE_CHECKING:
    from sky_core.components.model import Decoder
    from sky_core.model.decoder import DecoderLM


class LitGPT(Contender):
    """`litgpt.GPT`."""

    name: ClassVar = "litgpt"
    libraries: ClassVar = ("litgpt", "litgpt.utils", "litgpt.generate.base")
    distributions: ClassVar = ("litgpt", "lightning")
    install: ClassVar = (
        "pip install --no-deps litgpt && pip install lightning torchmetrics psutil"
        " 'jsonargparse[signatures]>=4.37,<=4.41' (--no-deps: litgpt pins an old huggingface-hub)"
    )

    def __init__(self, model: DecoderLM, device: str) -> None:
        from litgpt import GPT, Config

        super().__init__(model, device)
        decoder = resolved(model)
        self.model: Any = GPT(Config(**config(decoder)))
        self.model.load_state_dict(weights(model, decoder), strict=True)
        if decoder.tie_embeddings:
            self.model.lm_head.weight = self.model.transformer.wte.weight
        self.model.to(device)
        self.max_length = decoder.max_length

    def prepare_training(self, precision: str, *, compile: bool) -> None:
        from litgpt.utils import chunked_cross_entropy

        self.precision = precision
        self.model.train()
        forward = torch.compile(self.model) if compile else self.model
        self.training = PeerTraining(
            self.model, lambda tokens, targets: chunked_cross_entropy(forward(tokens), targets), self.autocast
        )

    def loss(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> float:
        with torch.no_grad(), self.autocast():
            logits_BTV = self.model(tokens_BT)
        return float(torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten()))

    def train_step(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> None:
        self.training.step(tokens_BT, targets_BT)

    def prepare_decoding(self, precision: str, *, compile: bool, batch: int, length: int) -> None:
        cast(self.model, precision)
        self.model.max_seq_length = length
        self.model.set_kv_cache(batch_size=batch, device=self.device, dtype=self.model.lm_head.weight.dtype)
        self.length = length

    def generate(self, prompts: Prompts, n: int) -> list[list[int]]:
        from litgpt.generate.base import batched_generate_fn, generate

        total = len(prompts[0]) + n
        with torch.inference_mode():
            if len(prompts) == 1:
                row_T = torch.tensor(prompts[0], device=self.device)
                return [generate(self.model, row_T, total, temperature=0.0, include_prompt=False).tolist()]
            if len({len(row) for row in prompts}) > 1:
                raise UserError("litgpt: its batched generation takes prompts of one length only")
            rows_BT = torch.tensor([list(row) for row in prompts], device=self.device)
            steps = batched_generate_fn(
                self.model, rows_BT, total, sample_args={"temperature": 0.0}, include_prompt=False, include_eos=False
            )
            return torch.stack([torch.cat(tokens) for tokens in steps], dim=1).tolist()


def config(decoder: Decoder) -> dict[str, Any]:
    """The options of `litgpt.Config`. Raises `UserError` for a model that it has no options for here."""
    position, norm, feedforward = decoder.position[0], decoder.norm, decoder.feedforward[0]
    known = (
        len(set(decoder.attention)) == 1
        and type(decoder.attention[0]) is Full
        and isinstance(feedforward, SwiGLU)
        and len(decoder.position) == 1
        and isinstance(position, Rope)
        and isinstance(norm, RMSNorm)
        and decoder.qk_norm in (None, "head")
        and decoder.block.kind == "pre"
        and not decoder.bias
        and decoder.logit_softcap is None
    )
    if not known:
        raise UserError("litgpt: only pre-norm decoders with full attention, RoPE, RMSNorm and SwiGLU are mapped here")
    assert isinstance(position, Rope)
    assert isinstance(norm, RMSNorm)
    assert isinstance(feedforward, SwiGLU)
    return {
        "name": "bench", "block_size": decoder.max_length, "vocab_size": decoder.vocab_size,
        "padded_vocab_size": decoder.vocab_size, "n_layer": decoder.n_layer, "n_head": decoder.n_head,
        "n_query_groups": decoder.n_kv_head, "n_embd": decoder.d_model, "head_size": decoder.width_of_head,
        "rotary_percentage": 1.0, "rope_base": position.theta, "parallel_residual": False, "bias": False,
        "norm_class_name": "RMSNorm", "norm_eps": norm.eps, "norm_qk": decoder.qk_norm == "head",
        "mlp_class_name": "LLaMAMLP", "intermediate_size": feedforward.d_ff,
    }  # fmt: skip


def weights(model: DecoderLM, decoder: Decoder) -> dict[str, torch.Tensor]:
    """Our weights under litgpt's names; q, k and v are one matrix there, one behind the other."""
    ours = model.state_dict()
    head = ours["embed_tokens.weight"] if decoder.tie_embeddings else ours["lm_head.weight"]
    found = {
        "transformer.wte.weight": ours["embed_tokens.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
        "lm_head.weight": head,
    }
    for i in range(decoder.n_layer):
        here, there = f"layers.{i}.", f"transformer.h.{i}."
        found[there + "attn.qkv.weight"] = torch.cat(
            [ours[f"{here}self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")]
        )
        for theirs, name in NAMES.items():
            if f"{here}{name}.weight" in ours:
                found[f"{there}{theirs}.weight"] = ours[f"{here}{name}.weight"]
    return found


NAMES = {
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.proj": "self_attn.o_proj",
    "attn.norm_q": "self_attn.q_norm",
    "attn.norm_k": "self_attn.k_norm",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
"""Part of a layer there -> here."""
