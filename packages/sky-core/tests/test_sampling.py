"""Choosing the next token: what each processor keeps, and that draws follow the distribution that is left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sky_core.components.generation import Greedy, Sample
from sky_core.generation import sampling
from sky_core.generation.sampling import TokenSampler, draw, row_generator

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
logits_BV = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30).map(lambda row: torch.tensor([row]))


def kept(logits: torch.Tensor) -> list[int]:
    return logits[0].isfinite().nonzero()[:, 0].tolist()


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [row_generator(seed, row) for row in range(count)]


def chi_squared(draws: torch.Tensor, probability_V: torch.Tensor) -> float:
    """Pearson's statistic over the values that can occur; fails when one that cannot did."""
    counts_V = torch.bincount(draws, minlength=len(probability_V)).double()
    possible = probability_V > 0
    assert counts_V[~possible].sum() == 0
    expected = probability_V[possible].double() * len(draws)
    return float(((counts_V[possible] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_draws_follow_the_stated_distribution(options: dict[str, float]) -> None:
    probability_V = (LOGITS[0] / options.get("temperature", 1.0)).softmax(0)
    if "top_k" in options:
        probability_V[int(options["top_k"]) :] = 0
        probability_V /= probability_V.sum()
    if "top_p" in options:
        probability_V[1:][probability_V.cumsum(0)[:-1] >= options["top_p"]] = 0
        probability_V /= probability_V.sum()
    if "min_p" in options:
        probability_V[probability_V < options["min_p"] * probability_V[0]] = 0
        probability_V /= probability_V.sum()
    sampler = TokenSampler(**{"temperature": 1.0, **options})
    draws = sampler(LOGITS.expand(20_000, -1), [[]] * 20_000, torch.Generator().manual_seed(5))
    # 18.47 is the 99.9 % quantile of chi-squared with 4 degrees of freedom, the most there are here; the seed is fixed
    assert chi_squared(draws, probability_V) < 18.47


def test_row_generators_follow_the_distribution_across_rows_and_across_steps() -> None:
    probability_V = LOGITS[0].softmax(0)
    across_rows = draw(LOGITS.expand(4000, -1), generators(4000))
    one = row_generator(3, 0)
    across_steps = torch.cat([draw(LOGITS, [one]) for _ in range(4000)])
    assert chi_squared(across_rows, probability_V) < 18.47
    assert chi_squared(across_steps, probability_V) < 18.47


def test_a_row_draws_the_same_whatever_its_neighbours() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    together = draw(logits, generators(6))
    alone = torch.cat([draw(logits[row : row + 1], [row_generator(0, row)]) for row in range(6)])
    assert together.tolist() == alone.tolist()


def test_seeds_and_rows_give_streams_of_their_own() -> None:
    firsts = {torch.rand(1, generator=row_generator(seed, row)).item() for seed in range(30) for row in range(30)}
    assert len(firsts) == 900


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    TokenSampler()(LOGITS, [[]], torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_removed_tokens_are_never_drawn_even_at_the_ends_of_the_unit_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.3, -torch.inf]])
    for u, expected in [(0.0, 1), (1 - 2**-53, 3)]:
        monkeypatch.setattr(sampling, "_uniform", lambda rows, generator, u=u: torch.tensor([[u]], dtype=torch.float64))
        assert draw(logits, torch.Generator()).item() == expected


def test_temperature_zero_is_greedy_and_a_tiny_one_does_not_overflow() -> None:
    logits = torch.tensor([[80.0, 81.0, -300.0]])
    for value in (0, 1e-30):
        assert TokenSampler(temperature=value)(logits, [[]], torch.Generator().manual_seed(0)).item() == 1


def test_greedy_takes_the_smallest_id_among_equals() -> None:
    assert Greedy().build()(torch.tensor([[0.0, 3.0, 3.0]]), [[]], None).item() == 1


@settings(deadline=None, max_examples=50)
@given(logits_BV, st.integers(1, 40))
def test_top_k_keeps_the_k_largest_and_their_ties(logits: torch.Tensor, k: int) -> None:
    kth = sorted(logits[0].tolist(), reverse=True)[min(k, logits.shape[1]) - 1]
    assert kept(sampling.top_k(logits, k)) == [i for i, x in enumerate(logits[0].tolist()) if x >= kth]


@settings(deadline=None, max_examples=50)
@given(logits_BV, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: torch.Tensor, p: float) -> None:
    probability_V = logits[0].softmax(0, dtype=torch.float64)
    nucleus = kept(sampling.top_p(logits, p))
    mass = probability_V[nucleus].sum().item()
    assert mass >= p - 1e-9  # the sum is rounded differently here
    assert mass - probability_V[nucleus].min().item() < p + 1e-9
    outside = [i for i in range(logits.shape[1]) if i not in nucleus]
    assert not outside or probability_V[outside].max() <= probability_V[nucleus].min()


@settings(deadline=None, max_examples=50)
@given(logits_BV)
def test_the_whole_nucleus_is_everything(logits: torch.Tensor) -> None:
    assert torch.equal(sampling.top_p(logits, 1.0), logits)


@settings(deadline=None, max_examples=50)
@given(logits_BV, st.floats(0, 1))
def test_min_p_keeps_what_is_probable_relative_to_the_most_probable(logits: torch.Tensor, p: float) -> None:
    probability_V = logits[0].softmax(0)
    expected = [i for i, x in enumerate(probability_V.tolist()) if x >= p * probability_V.max()]
    assert kept(sampling.min_p(logits, p)) == expected
    assert int(logits.argmax()) in expected


@settings(deadline=None, max_examples=50)
@given(logits_BV, st.sampled_from([{"top_k": 1}, {"top_p": 1e-6}]))
def test_the_narrowest_truncation_draws_a_most_probable_token(logits: torch.Tensor, options: dict[str, float]) -> None:
    drawn = TokenSampler(**options)(logits, [[]], torch.Generator().manual_seed(0))
    assert logits[0, drawn] == logits.max()


def test_the_repetition_penalty_lowers_seen_tokens_of_either_sign_and_no_other() -> None:
    penalised = sampling.repetition_penalty(LOGITS, [[0, 3, 3]], 2.0)
    assert penalised.tolist() == [[1.0, 1.0, 0.0, -2.0, -2.0]]
    favoured = sampling.repetition_penalty(LOGITS, [[0, 3]], 0.5)
    assert favoured.tolist() == [[4.0, 1.0, 0.0, -0.5, -2.0]]


def test_the_repetition_penalty_looks_at_each_row_alone() -> None:
    penalised = sampling.repetition_penalty(LOGITS.repeat(3, 1), [[0], [], [1, 4]], 2.0)
    assert penalised.tolist() == [[1, 1, 0, -1, -2], [2, 1, 0, -1, -2], [2, 0.5, 0, -1, -4]]


def test_the_penalty_comes_before_temperature_and_counts_for_greedy_too() -> None:
    logits = torch.tensor([[2.0, 1.5]])
    assert TokenSampler(temperature=0, repetition_penalty=2.0)(logits, [[0]], None).item() == 1
    warm = TokenSampler(temperature=0.5, repetition_penalty=2.0)
    penalised = sampling.repetition_penalty(logits, [[0]], 2.0)
    torch.testing.assert_close(warm.truncated(penalised).softmax(-1), (penalised / 0.5).softmax(-1))


def test_the_stated_probabilities_are_those_after_every_processor() -> None:
    sampler = TokenSampler(temperature=0.7, top_k=4, top_p=0.9, min_p=0.01, repetition_penalty=1.4)
    penalised = sampling.repetition_penalty(LOGITS, [[1]], 1.4)
    expected = sampler.truncated(penalised).softmax(-1, dtype=torch.float64)
    assert torch.equal(sampler.probabilities(LOGITS, [[1]]), expected)
    greedy = TokenSampler(temperature=0, repetition_penalty=4.0)
    assert greedy.probabilities(LOGITS, [[0]]).tolist() == [[0, 1, 0, 0, 0]]
    assert greedy.probabilities(LOGITS, [[0]]).dtype == torch.float64


@pytest.mark.parametrize(
    "option",
    [{"temperature": -0.1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -1}, {"repetition_penalty": 0}],
)
def test_an_option_out_of_range_is_refused(option: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        Sample(**option)


# vocabularies of more than one block, and of more tokens than are looked at first


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 700), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_a_number_leads_to_the_token_whose_share_of_the_whole_it_falls_into(
    size: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_BV = torch.randn(20, size, generator=generator).mul(6).exp().to(dtype)
    weight_BV[torch.rand(20, size, generator=generator) < 0.5] = 0
    weight_BV[:, seed % size] = 1e-3
    u_B1 = torch.rand(20, 1, generator=generator, dtype=torch.float64)
    u_B1[0], u_B1[1] = 0, 1 - 2**-53
    token_B = sampling.invert(weight_BV, u_B1)
    assert (weight_BV.gather(-1, token_B[:, None]) > 0).all()
    share_BV = weight_BV.double() / weight_BV.sum(-1, keepdim=True, dtype=torch.float64)
    end_B1 = share_BV.cumsum(-1).gather(-1, token_B[:, None])
    # a sum of 128 weights in fp32 is off by some 1e-7 of itself
    assert (end_B1 > u_B1 - 1e-6).all()
    assert (end_B1 - share_BV.gather(-1, token_B[:, None]) < u_B1 + 1e-6).all()


def test_rare_tokens_keep_their_chance() -> None:
    """A fp32 sum of 1 and 1e-9 is 1; the token of 1e-9 is drawn all the same, as often as it should be."""
    weight_BV = torch.full((1, 1000), 1e-9)
    weight_BV[0, 500] = 1.0
    below = 400e-9 / (1 + 999e-9)
    assert sampling.invert(weight_BV, torch.tensor([[below * 1.0001]], dtype=torch.float64)).item() == 400
    assert sampling.invert(weight_BV, torch.tensor([[below * 0.9999]], dtype=torch.float64)).item() == 399
    assert sampling.invert(weight_BV, torch.tensor([[1 - 1e-9 / 2]], dtype=torch.float64)).item() == 999


@pytest.mark.parametrize("p", [1e-6, 0.3005, 0.9005, 0.9995])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_the_sorted_one(p: float) -> None:
    """Rows with a narrow nucleus, a wide one, one among equals (the smallest ids are kept), and truncated before."""
    noise_BV = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    logits_BV = torch.stack((5 * noise_BV[0], noise_BV[1] / 2, noise_BV[2].round(), torch.zeros(1000)))
    logits_BV = torch.cat((logits_BV, sampling.top_k(noise_BV[3:], 40)))
    sorted_BV, order_BV = logits_BV.double().sort(descending=True, stable=True)
    probability_BV = sorted_BV.softmax(-1)
    for row, nucleus in enumerate(sampling.top_p(logits_BV, p).isfinite()):
        count = int((probability_BV[row].cumsum(0) - probability_BV[row] < p).sum())
        assert nucleus.nonzero().flatten().tolist() == sorted(order_BV[row, :count].tolist())
