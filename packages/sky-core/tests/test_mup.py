"""muP: at the base width the standard parametrisation, and everywhere else activations that do not know the width."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sky_core.components.model import Decoder
from sky_core.model.decoder import DecoderLM
from sky_core.testing.workbench import component

VOCAB = 31
WIDTHS = (32, 64, 128, 256)


def built(width: int, mup: bool, seed: int = 0, **options: object) -> DecoderLM:
    torch.manual_seed(seed)
    mup_table = {"mup": {"base_d_model": 32}} if mup else {}
    config = {"n_layer": 2, "n_head": width // 8, "d_model": width, "max_length": 16, "tie_embeddings": False}
    return Decoder.model_validate({**config, **mup_table, **options}).build(VOCAB)


@torch.no_grad()
def outputs(model: DecoderLM, tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    collect: dict[str, list[torch.Tensor]] = {"hidden_states": []}
    hidden_BTD = model.hidden(tokens_BT, collect=collect)
    return {"layers": collect["hidden_states"][-1], "logits": model.logits(hidden_BTD)}


def changes(width: int, mup: bool, steps: int = 4, **options: object) -> dict[str, float]:
    """Mean size of what `steps` of AdamW change in hidden states and logits (the coordinate check of the paper)."""
    sizes: dict[str, float] = {}
    for seed in range(3):
        model = built(width, mup, seed, **options)
        tokens_BT = torch.randint(VOCAB, (4, 17), generator=torch.Generator().manual_seed(seed))

        before = outputs(model, tokens_BT[:, :-1])
        (optimizer,) = component("optimizer", "adamw", lr=0.01).build(list(model.named_parameters()), model.lr_scale())
        for _ in range(steps):
            hidden = model.hidden(tokens_BT[:, :-1])
            (model.nll(hidden, tokens_BT[:, 1:]) / tokens_BT[:, 1:].numel()).backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, tensor in outputs(model, tokens_BT[:, :-1]).items():
            sizes[name] = sizes.get(name, 0.0) + (tensor - before[name]).abs().mean().item() / 3
    return sizes


def slope(values: list[float]) -> float:
    """Of log(value) over log(width), by least squares."""
    x = [math.log(width) for width in WIDTHS]
    y = [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}], ids=["untied", "tied"])
def test_what_training_changes_does_not_grow_with_the_width(options: dict[str, object]) -> None:
    """Four doublings: a slope of 0.1 is a factor 1.2 from the narrowest to the widest, 0.4 is one of 2.3."""
    flat = [changes(width, mup=True, **options) for width in WIDTHS]
    for name in ("layers", "logits"):
        assert abs(slope([size[name] for size in flat])) < 0.15, (name, flat)


def test_without_it_the_same_rate_changes_wider_models_more() -> None:
    steep = [changes(width, mup=False) for width in WIDTHS]
    assert slope([size["logits"] for size in steep]) > 0.4, steep
    assert all(narrow["logits"] < wide["logits"] for narrow, wide in pairwise(steep))


def test_at_the_base_width_nothing_changes() -> None:
    standard, scaled = built(32, mup=False), built(32, mup=True)
    tokens_BT = torch.randint(VOCAB, (2, 9))
    assert torch.equal(standard(tokens_BT), scaled(tokens_BT))
    assert set(scaled.lr_scale().values()) == {1.0}
    assert standard.lr_scale() == {}


def test_rates_follow_the_table() -> None:
    model = built(128, mup=True, qk_norm="head")
    scale = model.lr_scale()
    hidden = {
        name for name, parameter in model.named_parameters() if name.startswith("layers.") and parameter.ndim == 2
    }
    assert scale == dict.fromkeys(hidden, 0.25)
    (optimizer,) = component("optimizer", "adamw", lr=0.01, weight_decay=0.1).build(
        list(model.named_parameters()), scale
    )
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        rate, decay = (0.0025, 0.4) if name in hidden else (0.01, 0.1 if parameter.ndim == 2 else 0.0)
        assert rates[id(parameter)] == pytest.approx((rate, decay)), name


def test_initial_weights_follow_the_table() -> None:
    model = built(256, mup=True)
    assert model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.03)
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    tokens_BT = torch.randint(VOCAB, (2, 9))
    hidden_BTD = model.hidden(tokens_BT)
    torch.testing.assert_close(model.logits(hidden_BTD), model.lm_head(hidden_BTD) / 8)


def test_wider_heads_have_smaller_scores() -> None:
    torch.manual_seed(0)
    wide = {"n_layer": 1, "n_head": 4, "d_model": 128, "mup": {"base_d_model": 32, "base_head_dim": 8}}
    (attention,) = Decoder.model_validate(wide).build(VOCAB)._attentions
    assert attention.scale == pytest.approx(8**0.5 / 32)


def test_muon_leaves_the_factors_to_adamw() -> None:
    model = built(128, mup=True)
    chosen = component("optimizer", "muon", lr=0.02, exclude=["*q_proj*"])
    muon, adamw = chosen.build(list(model.named_parameters()), model.lr_scale())
    assert {group["lr"] for group in muon.param_groups} == {0.02}
    assert {group["lr"] for group in adamw.param_groups} == {3e-3, 3e-3 / 4}
