"""Adapters touch a model in four places, change nothing until trained, and leave nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sky_core.components.model import Decoder
from sky_core.components.position import Learned
from sky_core.errors import UserError
from sky_core.model.adapter import Attached, linears
from sky_core.model.language_model import LanguageModel

VOCAB, WIDTH, LAYERS, GROUPS, HEAD = 41, 32, 2, 2, 8


def base(**options) -> LanguageModel:
    torch.manual_seed(0)
    options = {"n_layer": LAYERS, "n_head": 4, "n_kv_head": GROUPS, "d_model": WIDTH, "max_length": 32} | options
    return Decoder(initializer_range=0.2, **options).build(VOCAB)


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


class LowRank(nn.Module):
    """x -> B A x, B = 0 at the start (LoRA)."""

    def __init__(self, linear: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.a = nn.Parameter(0.1 * torch.randn(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a.T @ self.b.T


def lora(model: LanguageModel, *targets: str) -> Attached:
    chosen = linears(model, targets or ["q_proj", "v_proj"])
    deltas = nn.ModuleList(LowRank(linear) for linear in chosen.values())
    attached = Attached(model, deltas)
    for linear, delta in zip(chosen.values(), deltas, strict=True):
        attached.linear(linear, lambda x, y, delta=delta: y + delta(x))
    return attached


def prefix(model: LanguageModel, length: int = 3) -> Attached:
    module = nn.ParameterList(torch.randn(2, 1, GROUPS, length, HEAD) for _ in range(LAYERS))
    attached = Attached(model, module)
    attached.prefix(lambda: {layer: (pair[0], pair[1]) for layer, pair in enumerate(module)}, tokens=length)
    return attached


class NewTokens(nn.Module):
    """A trained change of some rows of the embedding, 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.change = nn.Embedding(VOCAB, WIDTH)
        nn.init.zeros_(self.change.weight)

    def forward(self, tokens_BT: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD + self.change(tokens_BT)


def soft_embedding(model: LanguageModel) -> Attached:
    attached = Attached(model, NewTokens())
    attached.embedding(attached.module)
    return attached


class Side(nn.Module):
    """A linear read-out of every residual stream, 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS + 1))
        for read in self.reads:
            nn.init.zeros_(read.weight)

    def forward(self, states: list[torch.Tensor], h_BTD: torch.Tensor) -> torch.Tensor:
        return h_BTD + sum(read(state) for read, state in zip(self.reads, states, strict=True))


def side(model: LanguageModel) -> Attached:
    attached = Attached(model, Side())
    attached.hidden(attached.module)
    return attached


SILENT = {"lora": lora, "embedding": soft_embedding, "side": side}
EVERY = {**SILENT, "prefix": prefix}
silent = pytest.mark.parametrize("attach", SILENT.values(), ids=SILENT)
every = pytest.mark.parametrize("attach", EVERY.values(), ids=EVERY)


def train(model: LanguageModel, attached: Attached, steps: int = 3) -> None:
    tokens_BT = some_tokens(2, 12)
    optimizer = torch.optim.SGD(attached.module.parameters(), lr=0.05)
    for _ in range(steps):
        loss = model.nll(model.hidden(tokens_BT), tokens_BT.roll(-1, 1)) / tokens_BT.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@silent
def test_what_starts_at_zero_changes_nothing_bit_for_bit(attach) -> None:
    model, tokens_BT = base(), some_tokens(2, 12)
    before = model(tokens_BT)
    attach(model)
    assert torch.equal(model(tokens_BT), before)


@every
def test_training_moves_the_adapter_and_nothing_else(attach) -> None:
    model, tokens_BT = base(), some_tokens(2, 12)
    weights = copy.deepcopy(model.state_dict())
    attached = attach(model)
    own, start = copy.deepcopy(attached.module.state_dict()), model(tokens_BT)
    train(model, attached)
    assert not torch.equal(model(tokens_BT), start)
    assert any(not torch.equal(own[name], tensor) for name, tensor in attached.module.state_dict().items())
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


@every
def test_taken_off_it_leaves_the_model_that_was_there(attach) -> None:
    model, tokens_BT = base(), some_tokens(2, 12)
    before = model(tokens_BT)
    attached = attach(model)
    train(model, attached)
    attached.detach()
    assert torch.equal(model(tokens_BT), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.adapters == []
    assert model.context_hooks == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@every
def test_an_adapted_model_decodes_in_pieces_as_in_parallel(attach) -> None:
    model, tokens_BT = base(), some_tokens(2, 12)
    train(model, attach(model))
    cache = model.new_cache(2)
    with torch.no_grad():
        decoded = torch.cat([model(piece, cache=cache) for piece in tokens_BT.split([5, 1, 1, 5], dim=1)], dim=1)
        torch.testing.assert_close(decoded, model(tokens_BT), rtol=0, atol=1e-4)


@every
def test_activation_checkpointing_gives_the_adapter_identical_gradients(attach) -> None:
    model, tokens_BT = base(), some_tokens(2, 12)
    attached = attach(model)
    train(model, attached)

    def gradients() -> list[torch.Tensor]:
        loss = model.nll(model.hidden(tokens_BT), tokens_BT.roll(-1, 1))
        return list(torch.autograd.grad(loss, list(attached.module.parameters())))

    plain = gradients()
    for policy in ("selective", "block"):
        model.activation_checkpointing = policy
        assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))


def test_a_prefix_made_from_tokens_is_those_tokens() -> None:
    model, tokens_BT = base(), some_tokens(2, 12)
    expected = model(tokens_BT)[:, 4:]
    cache = model.new_cache(2)
    with torch.no_grad():
        model(tokens_BT[:, :4], cache=cache)
    attached = Attached(model, nn.Module())
    pairs = {layer: (state.k_BHSE[:, :, :4], state.v_BHSE[:, :, :4]) for layer, state in enumerate(cache.layers)}
    attached.prefix(lambda: pairs, tokens=4)
    torch.testing.assert_close(model(tokens_BT[:, 4:]), expected, rtol=0, atol=1e-4)


def test_two_prefixes_stand_one_behind_the_other() -> None:
    model, tokens_BT = base(), some_tokens(2, 8)
    first, second = prefix(model, 2), prefix(model, 3)
    both = model(tokens_BT)
    first.detach()
    second.detach()
    joined = Attached(model, nn.Module())
    pairs = [torch.cat((a, b), dim=3) for a, b in zip(first.module, second.module, strict=True)]
    joined.prefix(lambda: {layer: (pair[0], pair[1]) for layer, pair in enumerate(pairs)}, tokens=5)
    assert torch.equal(model(tokens_BT), both)


def test_adapters_come_off_in_any_order_and_the_base_stays_frozen_until_the_last() -> None:
    model, tokens_BT = base(), some_tokens(2, 8)
    before = model(tokens_BT)
    first, second = lora(model), side(model)
    train(model, second)
    first.detach()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.adapters == [second]
    second.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(tokens_BT), before)


def test_what_was_frozen_before_stays_frozen() -> None:
    model = base()
    model.embed_tokens.weight.requires_grad_(False)
    lora(model).detach()
    assert not model.embed_tokens.weight.requires_grad
    assert model.layers[0].self_attn.q_proj.weight.requires_grad


def test_an_adapter_on_an_untied_head_reaches_the_loss() -> None:
    model, tokens_BT = base(tie_embeddings=False), some_tokens(2, 12)
    attached = lora(model, "lm_head")
    train(model, attached)
    logits_BTV = model(tokens_BT)
    expected = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="sum")
    torch.testing.assert_close(model.nll(model.hidden(tokens_BT), tokens_BT), expected)
    assert attached.module[0].b.abs().sum() > 0


def test_targets_name_layers_by_the_end_of_their_path() -> None:
    model = base()
    assert list(linears(model, ["layers.1.mlp.up_proj"])) == ["layers.1.mlp.up_proj"]
    assert list(linears(model, ["mlp.up_proj"])) == ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]
    assert len(linears(model, ["q_proj", "v_proj", "layers.0.self_attn.q_proj"])) == 4


@pytest.mark.parametrize(("target", "hint"), [("q_prj", "did you mean 'q_proj'"), ("lm_head", "have: down_proj")])
def test_a_target_that_names_nothing_is_an_error(target: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"no linear layer is called '{target}'.*{hint}"):
        linears(base(), ["v_proj", target])


def test_a_prefix_takes_its_room_from_the_context_of_learned_positions() -> None:
    model = base(position=(Learned(),), max_length=16)
    prefix(model, 3)
    assert model(some_tokens(1, 13)).shape == (1, 13, VOCAB)
    with pytest.raises(IndexError):
        model(some_tokens(1, 14))
