"""Optimizer components: groups, routing, defaults, errors, and state that survives a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sky_core.components.optimization import AdamW, Muon
from sky_core.errors import ConfigError, SkyError
from sky_core.training.engine import LocalEngine
from sky_core.training.groups import is_embedding_or_head, trainable


class Tiny(nn.Module):
    """The parameter names and shapes of a decoder, with a loss that reaches all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "up_proj": nn.Linear(8, 24), "down_proj": nn.Linear(24, 8)})
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embed_tokens(tokens_BT)
        for layer in self.layers:
            x_BTD = x_BTD + layer["down_proj"](torch.relu(layer["up_proj"](layer["q_proj"](x_BTD))))
        return self.lm_head(self.norm(x_BTD))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def train(model: Tiny, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        tokens_BT = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(step))
        logits_BTV = model(tokens_BT)
        nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def engine_of(model: Tiny, optimizers: list[torch.optim.Optimizer]) -> LocalEngine:
    engine = LocalEngine()
    engine.step, engine.optimizers = model, optimizers  # type: ignore[assignment]
    return engine


COMPONENTS = [
    AdamW(),
    AdamW(fused=False),
    Muon(),
    Muon(scale="match_rms_adamw", iteration="polar_express", lr=1e-3, adamw=AdamW(fused=False)),
]


@pytest.mark.parametrize("component", COMPONENTS, ids=str)
def test_every_trainable_parameter_is_in_exactly_one_group(component: AdamW | Muon) -> None:
    model = tiny()
    model.norm.weight.requires_grad_(False)
    optimizers = component.build(list(model.named_parameters()))
    grouped = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("component", COMPONENTS, ids=str)
def test_resuming_from_state_by_parameter_name_is_bit_exact(component: AdamW | Muon) -> None:
    straight = tiny()
    train(straight, component.build(list(straight.named_parameters())), range(10))

    first = tiny()
    optimizers = component.build(list(first.named_parameters()))
    train(first, optimizers, range(5))
    saved = {key: value.clone() for key, value in engine_of(first, optimizers).optimizer_state().items()}
    weights = {key: value.clone() for key, value in first.state_dict().items()}

    second = tiny()
    second.load_state_dict(weights)
    optimizers = component.build(list(second.named_parameters()))
    engine_of(second, optimizers).load_optimizer_state(saved)
    train(second, optimizers, range(5, 10))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_checkpoint_moves_between_our_adamw_and_torchs_fused_one() -> None:
    ends = []
    for kernels in ((True, True), (False, True), (True, False)):
        model = tiny()
        optimizers = AdamW(fused=kernels[0]).build(list(model.named_parameters()))
        train(model, optimizers, range(5))
        saved = {key: value.clone() for key, value in engine_of(model, optimizers).optimizer_state().items()}
        optimizers = AdamW(fused=kernels[1]).build(list(model.named_parameters()))
        engine_of(model, optimizers).load_optimizer_state(saved)
        train(model, optimizers, range(5, 10))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    # Ten updates of lr 1e-3: rounding apart, the paths coincide to far below one update.
    assert torch.allclose(ends[0], ends[1], atol=1e-6, rtol=0)
    assert torch.allclose(ends[0], ends[2], atol=1e-6, rtol=0)


def decay_of(component: AdamW | Muon, model: Tiny) -> dict[str, float]:
    optimizers = component.build(list(model.named_parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g["weight_decay"] for o in optimizers for g in o.param_groups for p in g["params"]}


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    model = tiny()
    for name, decay in decay_of(AdamW(weight_decay=0.3), model).items():
        assert decay == (0.3 if model.get_parameter(name).ndim >= 2 else 0.0), name


def test_embeddings_and_named_parameters_can_be_spared_decay() -> None:
    decays = decay_of(AdamW(weight_decay=0.3, decay_embeddings=False, no_decay=("*up_proj*",)), tiny())
    spared = {name for name, decay in decays.items() if decay == 0.0 and name.endswith("weight")}
    assert spared == {
        "embed_tokens.weight",
        "lm_head.weight",
        "norm.weight",
        "layers.0.up_proj.weight",
        "layers.1.up_proj.weight",
    }


def test_muon_takes_hidden_matrices_and_leaves_the_rest_to_adamw() -> None:
    model = tiny()
    muon, adamw = Muon(lr=0.05, exclude=("layers.1.down_proj*",), adamw=AdamW(lr=0.007)).build(
        list(model.named_parameters())
    )
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken == {
        *(f"layers.0.{part}.weight" for part in ("q_proj", "up_proj", "down_proj")),
        *(f"layers.1.{part}.weight" for part in ("q_proj", "up_proj")),
    }
    assert {group["lr"] for group in muon.param_groups} == {0.05}
    assert {group["lr"] for group in adamw.param_groups} == {0.007}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embed_tokens.weight", True),
        ("model.embed_tokens.weight", True),
        ("model.position.embedding.weight", True),
        ("transformer.wte.weight", True),
        ("transformer.wpe.weight", True),
        ("lm_head.weight", True),
        ("objective.value_head.weight", True),
        ("layers.0.self_attn.q_proj.weight", False),
        ("layers.0.mlp.down_proj.weight", False),
        ("layers.0.self_attn.head_mix.weight", False),
        ("header.proj.weight", False),
    ],
)
def test_embeddings_and_heads_are_told_by_name(name: str, expected: bool) -> None:
    assert is_embedding_or_head(name) is expected


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2, 2))


def test_named_parameters_must_be_named_and_distinct() -> None:
    shared = parameter()
    wrong: list[tuple[list[Any], str]] = [
        ([("", parameter())], "has no name"),
        ([("a", parameter()), ("a", parameter())], "two parameters are called 'a'"),
        ([("a", shared), ("b", shared)], "one parameter has two names, 'a' and 'b'"),
        ([("a", parameter().requires_grad_(False))], "nothing to optimize"),
    ]
    for named, message in wrong:
        with pytest.raises(SkyError, match=message):
            trainable(named)


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.no_decay: 'qproj' matches no trainable parameter"):
        AdamW(no_decay=("qproj",)).build(list(tiny().named_parameters()))
    with pytest.raises(ConfigError, match=r"optimizer\.exclude: 'qproj' matches no"):
        Muon(exclude=("qproj",)).build(list(tiny().named_parameters()))


def test_muon_without_a_hidden_matrix_says_so() -> None:
    with pytest.raises(ConfigError, match="muon finds no hidden matrix among 1 tensors, 88 elements; use adamw"):
        Muon().build([("embed_tokens.weight", tiny().embed_tokens.weight)])


def test_components_read_what_they_dump() -> None:
    for component in COMPONENTS:
        assert type(component).model_validate(component.model_dump()) == component
    assert AdamW.model_validate({"betas": [0.8, 0.99]}).betas == (0.8, 0.99)
    assert Muon.model_validate({"adamw": {"lr": 0.1}, "exclude": ["x*"]}).adamw == AdamW(lr=0.1)
