"""With a draft, tokens are distributed as the model's own: counted over many rows, against the exact distribution.

Every test here has a fixed seed, so it always passes or always fails; a correct rule gives a p-value below 1e-3 for one
seed in a thousand, and the wrong rules at the end give p-values far below it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sky_core.components.generation import Sample
from sky_core.generation import batch
from sky_core.generation.decode import generate_tokens
from sky_core.generation.drafts import DraftModel, MtpDraft, PromptLookup
from sky_core.generation.sampling import draw, row_generator
from sky_core.generation.speculative import Draft, Proposal, accept
from sky_core.model.language_model import LanguageModel
from sky_core.testing.workbench import tiny_model
from sky_core.tokenizer.char import CharTokenizer

LETTERS = CharTokenizer("abcd", byte_fallback=False, end_of_text=False)
V, LENGTH, ROWS = 4, 4, 2500
PROMPT = [0, 3, 0, 1, 0, 3]

SAMPLERS = {
    "temperature": Sample(temperature=1.0),
    "truncation": Sample(temperature=1.5, top_k=3, top_p=0.95),
    "penalty": Sample(temperature=1.0, repetition_penalty=1.7),
}
DRAFTS: dict[str, Callable[[], Draft]] = {
    "bad model": lambda: DraftModel(tiny_model(V, seed=5, n_layer=1, initializer_range=0.5), 2),
    "lookup": lambda: PromptLookup(2, ngram=1),
    "mtp": lambda: MtpDraft(2),
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(V, n_layer=1, initializer_range=0.3, tie_embeddings=False, n_mtp=2)


def exact(model: LanguageModel, sampler: Sample) -> torch.Tensor:
    """Probability of each of the V ** LENGTH continuations of the prompt, in order of their digits."""
    choose = sampler.build()
    joint = torch.ones(1, dtype=torch.float64)
    for length in range(LENGTH):
        rows = [[*PROMPT, *own] for own in itertools.product(range(V), repeat=length)]
        with torch.no_grad():
            p_NV = choose.probabilities(model(torch.tensor(rows))[:, -1], rows)
        joint = (joint[:, None] * p_NV).flatten()
    return joint


def p_value(counts: torch.Tensor, probability: torch.Tensor) -> float:
    """Pearson's test; cells in which fewer than 5 are expected count as one (the approximation asks for 5)."""
    expected = probability * counts.sum()
    assert counts[probability == 0].sum() == 0, "something impossible was drawn"
    rare = expected < 5
    observed, expected = (torch.cat((x[~rare], x[rare].sum()[None])).double() for x in (counts, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2))


def drawn(model: LanguageModel, sampler: Sample, draft: Draft | None) -> float:
    """The p-value of the first LENGTH tokens of many rows; one more leaves room for a pass to its end."""
    options: dict[str, Any] = {"sampler": sampler, "max_new_tokens": LENGTH + 1, "seed": 11, "draft": draft}
    rows = generate_tokens(model, LETTERS, [PROMPT] * ROWS, **options)
    tokens = torch.tensor([row.tokens[:LENGTH] for row in rows])
    codes = (tokens * V ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    return p_value(torch.bincount(codes, minlength=V**LENGTH), exact(model, sampler))


def test_the_test_passes_what_the_model_says_alone(model: LanguageModel) -> None:
    assert drawn(model, SAMPLERS["temperature"], None) > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS)
def test_the_joint_distribution_of_several_tokens_is_the_models(model: LanguageModel, draft: Any, sampler: Any) -> None:
    assert drawn(model, sampler, draft()) > 1e-3


# The rule by itself


def some(rows: int, places: int, seed: int) -> torch.Tensor:
    """Distributions p_BKV of which every row is the same."""
    logits_KV = 1.5 * torch.randn(places, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits_KV.softmax(-1).expand(rows, -1, -1)


def proposed(q_BKV: torch.Tensor) -> Proposal:
    generator = torch.Generator().manual_seed(3)
    places = [draw(q_BKV[:, place].log(), generator) for place in range(q_BKV.shape[1])]
    return Proposal(torch.stack(places, dim=1).tolist(), q_BKV)


def test_as_much_is_accepted_as_p_and_q_have_in_common() -> None:
    """Leviathan et al., theorem 3.5: a token is accepted with probability sum_x min(p(x), q(x))."""
    rows = 4000
    p_BKV, q_BKV = some(rows, 2, seed=1), some(rows, 1, seed=2)
    chosen = accept(p_BKV, proposed(q_BKV), [row_generator(0, row) for row in range(rows)])
    share = sum(len(tokens) == 2 for tokens in chosen) / rows
    expected = float(torch.minimum(p_BKV[0, 0], q_BKV[0, 0]).sum())
    assert 0.2 < expected < 0.8
    # four standard deviations of a share of 4000 are at most 4 * 0.5 / sqrt(4000)
    assert share == pytest.approx(expected, abs=0.032)


def test_rows_that_propose_nothing_draw_as_without_a_draft() -> None:
    logits_BV = torch.randn(50, V, generator=torch.Generator().manual_seed(0))
    p_BKV = logits_BV.softmax(-1, dtype=torch.float64)[:, None]
    chosen = accept(p_BKV, Proposal([[] for _ in range(50)]), [row_generator(0, row) for row in range(50)])
    assert [token for (token,) in chosen] == draw(logits_BV, [row_generator(0, row) for row in range(50)]).tolist()


def test_each_row_takes_one_random_number_more_than_it_proposes() -> None:
    p_BKV, tokens = some(3, 4, seed=1), [[1, 2, 3], [], [0]]
    generators = [row_generator(0, row) for row in range(3)]
    accept(p_BKV, Proposal(tokens), generators)
    for row, own in enumerate(tokens):
        fresh = row_generator(0, row)
        torch.rand(len(own) + 1, generator=fresh, dtype=torch.float64)
        assert torch.equal(fresh.get_state(), generators[row].get_state())


def test_a_draft_that_is_not_finite_costs_its_guesses_and_nothing_else() -> None:
    rows = 4000
    p_BKV = some(rows, 3, seed=1)
    broken = Proposal([[1, 2]] * rows, torch.full_like(p_BKV[:, :2], torch.nan))
    chosen = accept(p_BKV, broken, [row_generator(0, row) for row in range(rows)])
    assert all(len(tokens) == 1 for tokens in chosen)
    assert p_value(torch.bincount(torch.tensor(chosen)[:, 0], minlength=V), p_BKV[0, 0]) > 1e-3


# Wrong rules are found


def always(p_BKV: torch.Tensor, proposal: Proposal, generators: Sequence[torch.Generator]) -> list[list[int]]:
    """Accepts whatever is proposed."""
    chosen = accept(p_BKV, Proposal([[] for _ in proposal.tokens]), generators)
    return [[*own, *tokens] for own, tokens in zip(proposal.tokens, chosen, strict=True)]


def from_the_whole(p_BKV: torch.Tensor, proposal: Proposal, generators: Sequence[torch.Generator]) -> list[list[int]]:
    """Replaces a rejected token by a draw from p, not from what p has beyond q."""
    chosen = accept(p_BKV, proposal, generators)
    for b, tokens in enumerate(chosen):
        if len(tokens) <= len(proposal.tokens[b]):
            tokens[-1] = int(draw(p_BKV[b, len(tokens) - 1].log()[None], generators[b]))
    return chosen


def one_place_late(p_BKV: torch.Tensor, proposal: Proposal, generators: Sequence[torch.Generator]) -> list[list[int]]:
    """Compares each token with the distribution after it."""
    return accept(p_BKV.roll(-1, dims=1), proposal, generators)


@pytest.mark.parametrize("wrong", [always, from_the_whole, one_place_late])
def test_a_wrong_rule_is_found(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    monkeypatch.setattr(batch, "accept", wrong)
    assert drawn(model, SAMPLERS["temperature"], DRAFTS["bad model"]()) < 1e-9
