"""The one-file GPT and the composed decoder are the same model."""

from __future__ import annotations

import pytest
import torch

from sky_core.components.attention import Naive, Sdpa
from sky_core.components.layers import GELU, LayerNorm
from sky_core.components.model import Decoder
from sky_core.components.position import Learned
from sky_core.model.nano import GPT, Config

VOCAB = 37


def nano(bias: bool = True, std: float = 0.2, seed: int = 0) -> GPT:
    """A small GPT with large weights, biases that are not 0 and gains that are not 1: errors show."""
    torch.manual_seed(seed)
    model = GPT(Config(VOCAB, max_length=24, n_layer=3, n_head=4, d_model=32, bias=bias))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std) if parameter.ndim == 2 else parameter.add_(std * torch.randn_like(parameter))
    return model


def decoder_with_weights_of(model: GPT, kernel: Naive | Sdpa):
    c = model.config
    composed = Decoder(
        n_layer=c.n_layer,
        n_head=c.n_head,
        d_model=c.d_model,
        max_length=c.max_length,
        bias=c.bias,
        position=(Learned(),),
        norm=LayerNorm(bias=c.bias),
        feedforward=(GELU(),),
        kernel=kernel,
    ).build(c.vocab_size)
    composed.to(model.norm.weight.dtype).load_state_dict(
        {decoder_name(name): tensor for name, tensor in model.state_dict().items()}
    )
    return composed


def decoder_name(name: str) -> str:
    return name.replace("embed_positions.", "positions.0.embed_positions.")


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("kernel", [Naive(), Sdpa()], ids=["naive", "sdpa"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    # The same sums in slightly different orders: a few roundings of 6e-8 (1e-16) each. Weights 25 times as large as at
    # the start amplify them so much that fp32 itself is 1e-6 off the truth, hence float64.
    ("dtype", "std", "tolerance"),
    [(torch.float32, 0.2, 1e-6), (torch.float64, 0.5, 1e-13)],
    ids=["fp32", "fp64"],
)
def test_logits_and_gradients_equal_those_of_the_composed_decoder(
    kernel: Naive | Sdpa, bias: bool, dtype: torch.dtype, std: float, tolerance: float
) -> None:
    one_file = nano(bias, std).to(dtype)
    composed = decoder_with_weights_of(one_file, kernel)
    tokens_BT = torch.randint(VOCAB, (3, 25))
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:].clone()
    targets_BT[0, :5] = -100

    assert relative_difference(composed(inputs_BT), one_file(inputs_BT)) <= tolerance
    one_file.loss(inputs_BT, targets_BT).backward()
    (composed.nll(composed.hidden(inputs_BT), targets_BT) / (targets_BT != -100).sum()).backward()
    gradients = {name: parameter.grad for name, parameter in composed.named_parameters()}
    expected = {decoder_name(name): parameter.grad for name, parameter in one_file.named_parameters()}
    assert gradients.keys() == expected.keys()
    # Relative to the whole gradient: that of k_proj's bias is 0 but for rounding (it shifts a row's scores alike).
    size = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= tolerance * size, name


def test_both_start_from_the_same_distribution() -> None:
    torch.manual_seed(0)
    one_file = GPT(Config(512, max_length=64, n_layer=4, n_head=4, d_model=64))
    composed = decoder_with_weights_of(GPT(one_file.config), Naive())
    fresh = composed.config.build(512).state_dict()
    for name, parameter in one_file.state_dict().items():
        # A standard deviation over n >= 4096 draws is known to 1/sqrt(2n) = 1%.
        assert float(fresh[decoder_name(name)].std()) == pytest.approx(float(parameter.std()), rel=0.06), name


def test_future_tokens_do_not_change_the_past() -> None:
    model, tokens_BT = nano(), torch.randint(VOCAB, (2, 16))
    changed_BT = tokens_BT.clone()
    changed_BT[:, 9:] = (changed_BT[:, 9:] + 1) % VOCAB
    torch.testing.assert_close(model(changed_BT)[:, :9], model(tokens_BT)[:, :9], rtol=0, atol=1e-5)


def test_it_learns_a_repeating_text_and_continues_it() -> None:
    torch.manual_seed(0)
    model = GPT(Config(8, max_length=16, n_layer=1, n_head=2, d_model=32))
    text_T = torch.arange(800) % 8
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        starts = torch.randint(700, (16,), generator=torch.Generator().manual_seed(step))
        rows_BT = torch.stack([text_T[i : i + 17] for i in starts])
        loss = model.loss(rows_BT[:, :-1], rows_BT[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Beyond max_length too: the context slides.
    generated = model.generate(text_T[None, :5], 30, temperature=0)
    assert generated.tolist() == [[i % 8 for i in range(35)]]


def test_top_k_of_one_is_the_best_token() -> None:
    model, prompt_BT = nano(), torch.randint(VOCAB, (2, 4))
    assert torch.equal(model.generate(prompt_BT, 8, top_k=1), model.generate(prompt_BT, 8, temperature=0))


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens do not fit the context of 24"):
        nano()(torch.zeros(1, 25, dtype=torch.long))


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a multiple of n_head"):
        Config(VOCAB, n_head=5, d_model=32)
