"""The decoder computes what Hugging Face's GPT-2 and Llama compute with the same weights."""

from __future__ import annotations

import pytest
import torch

from sky_core.components.attention import Naive, Sdpa
from sky_core.components.layers import GELU, LayerNorm, RMSNorm, SwiGLU
from sky_core.components.model import Decoder
from sky_core.components.position import Learned, Rope

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

KERNELS = pytest.mark.parametrize("kernel", [Naive(), Sdpa()], ids=["naive", "sdpa"])
VOCAB = 59


def shaken(model):
    """Gains that are not 1 and biases that are not 0: with those of a fresh model errors stay hidden."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """GPT-2 keeps matrices as (in, out)."""
    return tensor.t()  # leaves vectors as they are


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest: fp32 sums of a hundred terms in another order, a few layers deep."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


def assert_same(ours, theirs, names: dict[str, str]) -> None:
    """Equal logits, and equal gradients of the weights paired by `names` (ours -> theirs)."""
    tokens_BT = torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(0))
    logits_BTV, expected_BTV = ours(tokens_BT), theirs(tokens_BT).logits
    close(logits_BTV, expected_BTV)
    ours.nll(ours.hidden(tokens_BT), tokens_BT.roll(-1, 1)).backward()
    torch.nn.functional.cross_entropy(
        expected_BTV.flatten(0, 1), tokens_BT.roll(-1, 1).flatten(), reduction="sum"
    ).backward()
    our_parameters, their_parameters = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name, their_name in names.items():
        close(our_parameters[name].grad, their_parameters[their_name].grad)


@KERNELS
def test_gpt2(kernel: Naive | Sdpa) -> None:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=24,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.2,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    theirs = shaken(transformers.GPT2LMHeadModel(config))
    ours = Decoder(
        n_layer=3,
        n_head=4,
        d_model=32,
        max_length=24,
        bias=True,
        position=(Learned(),),
        norm=LayerNorm(),
        feedforward=(GELU(approximate="tanh"),),
        kernel=kernel,
    ).build(VOCAB)

    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    weights = {"embed_tokens.weight": state["wte.weight"], "positions.0.embed_positions.weight": state["wpe.weight"]}
    names = {
        "embed_tokens.weight": "transformer.wte.weight",
        "positions.0.embed_positions.weight": "transformer.wpe.weight",
    }
    parts = {
        "input_layernorm": "ln_1",
        "self_attn.o_proj": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        weights[f"norm.{kind}"], names[f"norm.{kind}"] = state[f"ln_f.{kind}"], f"transformer.ln_f.{kind}"
        for i in range(3):
            for ours_part, theirs_part in parts.items():
                tensor = state[f"h.{i}.{theirs_part}.{kind}"]
                weights[f"layers.{i}.{ours_part}.{kind}"] = transposed(tensor)
                if tensor.ndim == 1:
                    names[f"layers.{i}.{ours_part}.{kind}"] = f"transformer.h.{i}.{theirs_part}.{kind}"
            fused = state[f"h.{i}.attn.c_attn.{kind}"].split(32, dim=-1)
            for proj, tensor in zip(("q_proj", "k_proj", "v_proj"), fused, strict=True):
                weights[f"layers.{i}.self_attn.{proj}.{kind}"] = transposed(tensor)
    ours.load_state_dict({name: tensor.contiguous() for name, tensor in weights.items()})
    assert_same(ours, theirs, names)


@KERNELS
@pytest.mark.parametrize(
    ("n_kv_head", "head_dim", "tied", "bias"), [(4, 8, True, False), (2, 8, False, True), (1, 16, False, False)]
)
def test_llama(kernel: Naive | Sdpa, n_kv_head: int, head_dim: int, tied: bool, bias: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=n_kv_head,
        head_dim=head_dim,
        max_position_embeddings=24,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        use_cache=False,
    )
    torch.manual_seed(0)
    theirs = shaken(transformers.LlamaForCausalLM(config))
    ours = Decoder(
        n_layer=3,
        n_head=4,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        d_model=32,
        max_length=24,
        bias=bias,
        tie_embeddings=tied,
        position=(Rope(theta=500.0),),
        norm=RMSNorm(eps=1e-5),
        feedforward=(SwiGLU(d_ff=80),),
        kernel=kernel,
    ).build(VOCAB)
    state = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    if tied:
        state.pop("lm_head.weight", None)
    ours.load_state_dict(state)
    names = {name: name if name.startswith("lm_head") else f"model.{name}" for name, _ in ours.named_parameters()}
    assert_same(ours, theirs, names)
