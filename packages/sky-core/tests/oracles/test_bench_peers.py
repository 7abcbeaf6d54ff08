"""The peers of `sky bench` hold our weights: equal losses, equal steps, equal texts; and the harness says when not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sky_core.bench.shape import find_shape
from sky_core.bench.train import AFTER_STEPS, WEIGHTS, agree, random_batch
from sky_core.errors import CheckFailed

PEERS = ["transformers", "litgpt"]


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param, reason=f"{request.param} is what ours is compared with")
    return request.param  # type: ignore[no-any-return]


def both(peer: str, **changes: Any) -> dict[str, Any]:
    from sky_core.bench.contenders import contender

    shape = find_shape(None, smoke=True)
    model = (shape.changed(**changes) if changes else shape).build()
    return {name: contender(name)(model, "cpu") for name in ("ours", peer)}


@pytest.mark.parametrize("tied", [True, False])
def test_a_peer_has_our_weights_and_takes_our_steps(peer: str, tied: bool) -> None:
    contenders = both(peer, tie_embeddings=tied)
    assert contenders["ours"].parameters == contenders[peer].parameters
    batch = random_batch(97, 2, 16, "cpu")
    agree(contenders, *batch, WEIGHTS, "with the same weights")
    before = contenders["ours"].loss(*batch)
    for one in contenders.values():
        one.prepare_training("fp32", compile=False)
        for _ in range(3):
            one.train_step(*batch)
    losses = agree(contenders, *batch, AFTER_STEPS["fp32"], "after three steps")
    assert losses["ours"] < before


@pytest.mark.parametrize("rows", [1, 3])
def test_a_peer_writes_what_ours_does(peer: str, rows: int) -> None:
    from sky_core.bench.decode import random_prompts, same_texts, with_static

    same_texts(find_shape(None, smoke=True), ["ours", *with_static([peer])], "cpu", random_prompts(97, rows, 5), 12)


@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_of_a_pass_are_those_of_all_weights_it_reads(peer: str, tied: bool) -> None:
    contenders = both(peer, tie_embeddings=tied)
    sizes = set()
    for one in contenders.values():
        one.prepare_decoding("bf16", compile=False, batch=1, length=32)
        sizes.add(one.decoded_bytes())
    parameters = contenders["ours"].parameters - (0 if tied else 97 * 32)
    assert sizes == {2 * parameters}


def test_a_wrong_weight_is_found_before_anything_is_timed(peer: str) -> None:
    contenders = both(peer)
    batch = random_batch(97, 2, 16, "cpu")
    wrong = copy.copy(contenders)
    with torch.no_grad():
        next(p for p in wrong[peer].model.parameters() if p.ndim == 2).mul_(1.01)
    with pytest.raises(CheckFailed, match=f"{peer} does not compute what ours does.*nothing was timed"):
        agree(wrong, *batch, WEIGHTS, "with the same weights")


def test_requests_of_mixed_length_are_answered_alike() -> None:
    pytest.importorskip("transformers", reason="transformers is what ours is compared with")
    from sky_core.bench.requests import answer, mixed

    asked = mixed(97, 6, 8, 10)
    contenders = both("transformers")
    texts = []
    for one in contenders.values():
        one.prepare_decoding("fp32", compile=False, batch=2, length=18)
        texts.append(answer(one, asked, 2))
    assert texts[0] == texts[1]
    assert [len(text) for text in texts[0]] == [n for _, n in asked]
