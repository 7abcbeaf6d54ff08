"""Our logit processors against those of transformers, on random logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sky_core.generation import sampling
from sky_core.generation.sampling import TokenSampler

logits_process = pytest.importorskip("transformers.generation.logits_process", reason="transformers is the oracle")

seeds = st.integers(0, 10_000)


def random_logits(seed: int, rows: int = 4, vocabulary: int = 97) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4


def assert_same_distribution(ours_BV: torch.Tensor, theirs_BV: torch.Tensor) -> None:
    assert torch.equal(ours_BV.isfinite(), theirs_BV.isfinite())
    # our temperature shifts the largest logit to 0, so probabilities are compared; 1e-6 is a few units of fp32
    torch.testing.assert_close(ours_BV.softmax(-1), theirs_BV.softmax(-1), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(0.05, 5))
def test_temperature(seed: int, value: float) -> None:
    x = random_logits(seed)
    assert_same_distribution(sampling.temperature(x, value), logits_process.TemperatureLogitsWarper(value)(None, x))


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(1, 120))
def test_top_k(seed: int, k: int) -> None:
    x = random_logits(seed)
    assert torch.equal(sampling.top_k(x, k), logits_process.TopKLogitsWarper(k)(None, x))


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(0.02, 0.98))
def test_top_p(seed: int, p: float) -> None:
    x = random_logits(seed)
    assert torch.equal(sampling.top_p(x, p), logits_process.TopPLogitsWarper(p)(None, x))


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(0, 1))
def test_min_p(seed: int, p: float) -> None:
    x = random_logits(seed)
    assert torch.equal(sampling.min_p(x, p), logits_process.MinPLogitsWarper(p)(None, x))


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(0.3, 3))
def test_repetition_penalty(seed: int, penalty: float) -> None:
    x = random_logits(seed)
    seen_BT = torch.randint(0, x.shape[1], (len(x), 30), generator=torch.Generator().manual_seed(seed))
    theirs = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(seen_BT, x)
    assert torch.equal(sampling.repetition_penalty(x, seen_BT.tolist(), penalty), theirs)


@settings(deadline=None, max_examples=50)
@given(seeds)
def test_all_together_in_the_same_order(seed: int) -> None:
    x = random_logits(seed)
    seen_BT = torch.randint(0, x.shape[1], (len(x), 10), generator=torch.Generator().manual_seed(seed))
    theirs = x
    for processor in (
        logits_process.RepetitionPenaltyLogitsProcessor(1.3),
        logits_process.TemperatureLogitsWarper(1.7),
        logits_process.TopKLogitsWarper(40),
        logits_process.TopPLogitsWarper(0.9),
        logits_process.MinPLogitsWarper(0.03),
    ):
        theirs = processor(seen_BT, theirs)
    sampler = TokenSampler(temperature=1.7, top_k=40, top_p=0.9, min_p=0.03, repetition_penalty=1.3)
    penalised = sampling.repetition_penalty(x, seen_BT.tolist(), 1.3)
    assert_same_distribution(sampler.truncated(penalised), theirs)
