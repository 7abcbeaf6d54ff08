"""The options of today's decoders, each held to what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sky_core.errors import UserError
from sky_core.model.decoder import DecoderLM
from sky_core.testing.workbench import TINY, assert_close, component, shaken, tiny_model

VOCAB = 23
TOKENS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def model(**options: Any) -> DecoderLM:
    """A tiny decoder with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return shaken(component("model", "decoder", **(TINY | options)).build(VOCAB).eval())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{"logit_softcap": 3.0}, {"mup": {"base_d_model": 4}}, {"vocab_size": 32}])
def test_the_loss_is_that_of_the_logits(options: dict[str, Any], tied: bool) -> None:
    lm = model(tie_embeddings=tied, **options)
    hidden_BTD = lm.hidden(TOKENS[:, :-1])
    expected = F.cross_entropy(lm.logits(hidden_BTD).flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    assert_close(lm.nll(hidden_BTD, TOKENS[:, 1:]), expected)


def test_an_adapter_on_the_head_is_capped_like_the_head() -> None:
    lm = model(tie_embeddings=False, logit_softcap=3.0)
    hidden_BTD = lm.hidden(TOKENS[:, :-1])
    lm.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 2)
    expected = F.cross_entropy(lm.logits(hidden_BTD).flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    assert_close(lm.nll(hidden_BTD, TOKENS[:, 1:]), expected)


def test_capped_logits_keep_their_order_and_stay_inside() -> None:
    plain, capped = model(), model(logit_softcap=1.0)
    capped.load_state_dict(plain.state_dict())
    logits_BTV, bounded_BTV = plain(TOKENS), capped(TOKENS)
    assert logits_BTV.abs().max() > 1.4
    assert_close(bounded_BTV, torch.tanh(logits_BTV))


def test_scores_that_are_capped_need_a_kernel_that_can() -> None:
    with pytest.raises(
        ValueError, match=r"kernel sdpa cannot cap scores, as attention\.softcap asks: use kernel: naive"
    ):
        model(kernel="sdpa", attention=["full", {"kind": "full", "softcap": 3.0}])


def test_embeddings_are_scaled_and_normed_before_the_first_layer() -> None:
    plain, scaled, normed = model(), model(scale_embeddings=True), model(embedding_norm=True)

    def first(lm: DecoderLM) -> torch.Tensor:
        collect: dict[str, Any] = {"hidden_states": []}
        lm.hidden(TOKENS, collect=collect)
        return collect["hidden_states"][0]

    assert torch.equal(first(scaled), scaled.embed_tokens(TOKENS) * 4.0)  # sqrt(16)
    assert torch.equal(first(plain), plain.embed_tokens(TOKENS))
    assert torch.equal(first(normed), normed.embedding_norm(normed.embed_tokens(TOKENS)))


def test_a_padded_vocabulary_has_rows_to_spare() -> None:
    lm = model(vocab_size=32)
    assert lm.embed_tokens.weight.shape == (32, 16)
    assert lm(TOKENS).shape == (2, 9, 32)
    with pytest.raises(
        UserError, match=r"model\.vocab_size: 16 rows cannot hold the tokenizer's 23 ids; set 23 or more"
    ):
        model(vocab_size=16)


def test_a_residual_start_of_zero_leaves_the_embedding_alone() -> None:
    lm = tiny_model(VOCAB, zero_residual=True)
    assert_close(lm.hidden(TOKENS), lm.norm(lm.embed_tokens(TOKENS)))


def test_residual_scalars_change_nothing_at_the_start_and_mix_in_the_embedding_later() -> None:
    plain, mixing = tiny_model(VOCAB), tiny_model(VOCAB, block={"kind": "pre", "residual_scalars": True})
    assert torch.equal(plain(TOKENS), mixing(TOKENS))
    with torch.no_grad():
        for layer in mixing.layers:  # r = 0, s = 1: every layer starts from the embedding, so only the last one counts
            layer.residual_scalars.copy_(torch.tensor([0.0, 1.0]))
    x_BTD = mixing.embed_tokens(TOKENS)
    mixing.layers[0].load_state_dict(mixing.layers[1].state_dict())
    one = tiny_model(VOCAB, n_layer=1)
    weights = {name.replace("layers.1.", "layers.0."): tensor for name, tensor in mixing.state_dict().items()}
    one.load_state_dict({name: weights[name] for name in one.state_dict()})
    assert torch.equal(one.embed_tokens(TOKENS), x_BTD)
    assert_close(mixing(TOKENS), one(TOKENS))


def test_value_embeddings_add_a_vector_of_the_token_to_the_values() -> None:
    lm = model(n_layer=1, attention={"kind": "full", "value_embedding": True}, position="none")
    attention = lm.layers[0].self_attn
    with torch.no_grad():
        attention.value_gate.weight.zero_()  # open at 1
    h_BTD = lm.layers[0].input_layernorm(lm.embed_tokens(TOKENS[:, :1]))
    # One token attends to itself alone: what comes out is its value.
    expected = attention.o_proj(attention.v_proj(h_BTD) + attention.value_embed(TOKENS[:, :1]))
    x_BTD = lm.embed_tokens(TOKENS[:, :1])
    x_BTD = x_BTD + expected
    x_BTD = x_BTD + lm.layers[0].think(lm.layers[0].post_attention_layernorm(x_BTD), None)
    assert_close(lm.hidden(TOKENS[:, :1]), lm.norm(x_BTD))


def test_tables_of_value_embeddings_count_as_embeddings() -> None:
    plain = model(n_layer=2).n_parameters()
    own = model(n_layer=2, attention={"kind": "full", "value_embedding": True}).n_parameters()
    assert own["embedding"] - plain["embedding"] == 2 * VOCAB * 16


@pytest.mark.parametrize(
    "options",
    [
        {"attention": {"kind": "full", "value_embedding": True}},
        {"attention": [{"kind": "full", "window": 3}, "full"]},
        {"attention": {"kind": "full", "softcap": 1.0, "scale": 0.5}},
        {"block": {"kind": "pre", "residual_scalars": True}},
        {"block": "sandwich", "norm": {"kind": "rmsnorm", "gain": "zero"}, "scale_embeddings": True},
        {"block": "reordered", "qk_norm": "full"},
        {"block": "parallel", "norm": "layernorm", "feedforward": "gelu", "bias": True},
    ],
    ids=["value embeddings", "windows", "capped scores", "scalars", "gemma", "olmo", "neox"],
)
def test_decoding_in_steps_equals_the_parallel_pass(options: dict[str, Any]) -> None:
    lm = model(**options)
    cache = lm.new_cache(2)
    steps = [lm(TOKENS[:, t : t + 1], cache=cache) for t in range(9)]
    assert_close(torch.cat(steps, dim=1), lm(TOKENS))


def test_the_first_layer_of_a_window_does_not_reach_further() -> None:
    lm = model(n_layer=1, attention={"kind": "full", "window": 3})
    other = TOKENS.clone()
    other[:, 2] = (other[:, 2] + 1) % VOCAB
    changed_T = (lm(TOKENS) - lm(other)).abs().amax((0, 2)) > 0
    assert changed_T.tolist() == [t in (2, 3, 4) for t in range(9)]
