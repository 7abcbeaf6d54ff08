"""Decoding with a draft: the same text as without it, in fewer passes; whatever the draft is worth."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sky_core.components.generation import Greedy, Sample
from sky_core.errors import UserError
from sky_core.generation import drafts
from sky_core.generation.decode import generate_tokens, stream_tokens
from sky_core.generation.drafts import DraftModel, MtpDraft, PromptLookup, make_draft
from sky_core.generation.passes import extend
from sky_core.generation.row import Generation
from sky_core.generation.speculative import Draft, Drafter, Proposal, Task
from sky_core.generation.text import generate
from sky_core.model.cache import KVCache, LayerCache
from sky_core.model.language_model import LanguageModel
from sky_core.testing.workbench import tiny_model
from sky_core.tokenizer.byte import ByteTokenizer
from sky_core.tokenizer.char import CharTokenizer

BYTES = ByteTokenizer()
RAGGED = [
    list(text.encode()) for text in ("a", "to be", "or not to be, that", "xyz", "whether 'tis nobler in the mind")
]
LARGE = {"initializer_range": 0.3, "tie_embeddings": False}
"""Random weights so large that every token hangs on the whole context: a mistake anywhere changes the text."""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(BYTES.vocab_size, n_mtp=3, **LARGE)


def like(model: LanguageModel, noise: float = 0.02) -> LanguageModel:
    """A model that often says what `model` says, and often not."""
    twin = tiny_model(BYTES.vocab_size, position=model.config.position, n_mtp=3, **LARGE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return twin


DRAFTS: dict[str, Callable[[LanguageModel], Draft]] = {
    "itself": lambda model: DraftModel(model, 4),
    "alike": lambda model: DraftModel(like(model), 5),
    "a stranger with a short context": lambda model: DraftModel(tiny_model(257, seed=7, max_length=24), 4),
    "lookup": lambda model: PromptLookup(4, ngram=1),
    "mtp": lambda model: MtpDraft(3),
}
every_draft = pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS)


def same(ours: list[Generation], theirs: list[Generation]) -> None:
    """Equal tokens, text and end; log-probabilities up to rounding (fp32, logits of order 10)."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one.tokens, one.text, one.finish) == (other.tokens, other.text, other.finish)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


# the same text


@every_draft
@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("count", [1, 2, 110])
def test_greedy_text_is_the_same_with_any_draft(position: str, draft: Any, count: int) -> None:
    """110 tokens go past the context of 64 (and several times past the stranger's), each row in its own time."""
    model = tiny_model(BYTES.vocab_size, position=position, n_mtp=3, **LARGE)
    plain = generate_tokens(model, BYTES, RAGGED, sampler=Greedy(), max_new_tokens=count)
    same(generate_tokens(model, BYTES, RAGGED, sampler=Greedy(), max_new_tokens=count, draft=draft(model)), plain)


@every_draft
def test_the_penalty_counts_the_tokens_before_each_place(model: LanguageModel, draft: Any) -> None:
    sampler = Sample(temperature=0, repetition_penalty=3.0)
    plain = generate_tokens(model, BYTES, RAGGED, sampler=sampler, max_new_tokens=40)
    assert all(len(set(row.tokens)) > 35 for row in plain), "almost nothing comes twice"
    same(generate_tokens(model, BYTES, RAGGED, sampler=sampler, max_new_tokens=40, draft=draft(model)), plain)


@every_draft
def test_stop_strings_and_the_end_of_text_end_a_row_in_the_middle_of_a_pass(model: LanguageModel, draft: Any) -> None:
    free = generate_tokens(model, BYTES, RAGGED, sampler=Greedy(), max_new_tokens=40)
    stops = [bytes(row.tokens[7 + i : 9 + i]).decode("latin1") for i, row in enumerate(free)]
    stops = [stop for stop in stops if stop.isascii()]
    tokenizer = ByteTokenizer()
    tokenizer.special = {"<|endoftext|>": free[2].tokens[12]}
    options = {"sampler": Greedy(), "max_new_tokens": 40, "stop": stops}
    plain = generate_tokens(model, tokenizer, RAGGED, **options)
    assert {row.finish for row in plain} >= {"end_of_text"}
    same(generate_tokens(model, tokenizer, RAGGED, **options, draft=draft(model)), plain)


@every_draft
def test_a_stream_brings_the_same_pieces(model: LanguageModel, draft: Any) -> None:
    options = {"sampler": Greedy(), "max_new_tokens": 30, "stop": "q"}
    for prompt in RAGGED[1:3]:
        plain = list(stream_tokens(model, BYTES, [prompt], **options))
        drafted = list(stream_tokens(model, BYTES, [prompt], **options, draft=draft(model)))
        assert [(p.token, p.text, p.finish) for p in drafted] == [(p.token, p.text, p.finish) for p in plain]


@every_draft
def test_a_sampled_row_does_not_depend_on_the_other_rows(model: LanguageModel, draft: Any) -> None:
    options = {"sampler": Sample(temperature=1.0, top_p=0.95), "max_new_tokens": 80, "seed": 4}
    together = generate_tokens(model, BYTES, RAGGED, **options, draft=draft(model))
    for row, prompt in enumerate(RAGGED[:3]):
        others = [*([65 + i] * (7 * i % 30 + 1) for i in range(row)), prompt]
        alone = generate_tokens(model, BYTES, others, **options, draft=draft(model))[row]
        assert alone.tokens == together[row].tokens


SMALL = CharTokenizer("abcd", byte_fallback=False, end_of_text=False)


@settings(deadline=None, max_examples=20)
@example([[0], [1, 2, 3]], 4, 20, 1)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(1, 30),
    st.integers(1, 3),
)
def test_any_rows_and_any_lengths_give_the_same_text(prompts: list[list[int]], k: int, count: int, n: int) -> None:
    target = tiny_model(4, max_length=12, n_mtp=2, **LARGE)
    plain = generate_tokens(target, SMALL, prompts, sampler=Greedy(), max_new_tokens=count)
    other = tiny_model(4, seed=2, max_length=13, initializer_range=0.3)
    for draft in (DraftModel(other, k), PromptLookup(k, n), MtpDraft(k)):
        same(generate_tokens(target, SMALL, prompts, sampler=Greedy(), max_new_tokens=count, draft=draft), plain)


def test_text_in_bf16_goes_on_past_the_context(model: LanguageModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for draft in (DraftModel(like(model), 4), MtpDraft(2)):
            rows = generate_tokens(model, BYTES, RAGGED, max_new_tokens=70, draft=draft)
            assert max(len(row.tokens) for row in rows) == 70


# what is proposed


class Spy(Draft):
    """`draft`, with every proposal noted: (row, tokens)."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.tokens, self.seen = draft, draft.tokens, list[tuple[list[int], list[int]]]()

    def start(self, task: Task) -> Drafter:
        drafter = self.draft.start(task)
        propose = drafter.propose

        def noted(rows: Sequence[Sequence[int]], *options: Any) -> Proposal:
            proposal = propose(rows, *options)
            self.seen += [(list(row), own) for row, own in zip(rows, proposal.tokens, strict=True)]
            return proposal

        drafter.propose = noted  # type: ignore[method-assign]
        return drafter

    def proposals(self, model: LanguageModel, count: int = 25) -> Iterator[tuple[list[int], list[int]]]:
        generate_tokens(model, BYTES, RAGGED, sampler=Greedy(), max_new_tokens=count, draft=self)
        assert len(self.seen) > len(RAGGED)
        return iter(self.seen)


def assert_greedy(draft: LanguageModel, row: list[int], own: list[int]) -> None:
    """`own` is what `draft` says after `row`, by the parallel forward alone."""
    for place, token in enumerate(own):
        with torch.no_grad():
            assert int(draft(torch.tensor([row + own[:place]]))[0, -1].argmax()) == token


def test_a_draft_model_proposes_its_own_greedy_chain(model: LanguageModel) -> None:
    draft = like(model)
    for row, own in Spy(DraftModel(draft, 4)).proposals(model):
        assert_greedy(draft, row, own)


def test_what_filled_up_a_row_with_fewer_proposals_is_not_taken_for_its_tokens(model: LanguageModel) -> None:
    """The draft is fed id 0 where a row has no guess of its own; here that is just what comes next."""
    draft, generators = like(model), [torch.Generator()] * 8
    drafter = DraftModel(draft, 4).start(Task(model, Greedy().build().probabilities, 257, 8, 64))
    first = drafter.propose([[65 + b] for b in range(8)], [4, *[1] * 7], generators)
    assert [len(own) for own in first.tokens] == [4, *[1] * 7]
    rows = [[65, 1], *([65 + b, *first.tokens[b], 0] for b in range(1, 8))]
    for row, own in zip(rows, drafter.propose(rows, [4] * 8, generators).tokens, strict=True):
        assert_greedy(draft, row, own)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_modules_propose_what_they_predict_without_a_cache(model: LanguageModel, depth: int) -> None:
    """Equation 21 of DeepSeek-V3 over the whole row at once: module k at position i reads token i + k."""
    for row, own in Spy(MtpDraft(depth)).proposals(model):
        assert len(own) <= depth
        with torch.no_grad():
            hidden_BTD = model.hidden(torch.tensor([row[:-1]]))
            for k, token in enumerate(own):
                later = (row + own)[k + 1 : len(row) + k]
                hidden_BTD = model.mtp_hidden(k, hidden_BTD, torch.tensor([later]))
                assert int(model.logits(hidden_BTD)[0, -1].argmax()) == token


@pytest.mark.parametrize(
    ("text", "ngram", "count", "expected"),
    [
        ("abcXabcYabc", 3, 4, "Yabc"),  # the last occurrence, not the first
        ("abcXbcYzzbc", 3, 3, "Yzz"),  # no bigger n-gram came before: a smaller one
        ("abababab", 2, 5, "ababa"),  # what is copied runs into itself
        ("aaa", 3, 3, "aaa"),
        ("abcd", 3, 4, ""),
        ("a", 3, 4, ""),
        ("abab", 3, 0, ""),
    ],
)
def test_lookup_proposes_what_followed(text: str, ngram: int, count: int, expected: str) -> None:
    drafter = PromptLookup(4, ngram).start(Task(tiny_model(257), Greedy().build(), 257, 1, 64))
    for end in range(1, len(text)):  # a text that grows is remembered as one that is read at once
        drafter.propose([text[:end].encode()], [0], [torch.Generator()])
    proposal = drafter.propose([text.encode()], [count], [torch.Generator()])
    assert bytes(proposal.tokens[0]).decode() == expected
    assert proposal.q_BKV is None


# fewer passes


def counting(vocab_size: int = 16) -> LanguageModel:
    """Says the next number, round and round: the layers add nothing, the head turns token t to t + 1."""
    model = tiny_model(vocab_size, tie_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.embed_tokens.weight.copy_(torch.eye(vocab_size, 16))
        model.lm_head.weight.copy_(torch.eye(vocab_size, 16).roll(1, 0))
    return model


def passes(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[int], Generation]:
    """How many tokens each pass of the model took in, and what came of it."""
    widths: list[int] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, **given: widths.append(x.shape[1]) or hidden(x, **given))
    [row] = generate_tokens(model, BYTES, [[3]], sampler=Greedy(), **options)
    return widths, row


def test_lookup_takes_fewer_passes_on_text_that_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    widths, row = passes(counting(), monkeypatch, max_new_tokens=60, draft=PromptLookup(4))
    assert row.tokens == [(4 + t) % 16 for t in range(60)]
    assert widths[:16] == [1] * 16, "nothing has repeated yet"
    assert len(widths) == 16 + 9, "44 tokens in passes of 5"
    assert (row.proposed, row.accepted) == (35, 35)


def test_a_perfect_draft_brings_one_token_more_than_it_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    widths, row = passes(counting(), monkeypatch, max_new_tokens=31, draft=DraftModel(counting(), 5))
    assert widths == [1, *[6] * 5]
    assert (row.proposed, row.accepted) == (25, 25)


def test_a_sampled_draft_equal_to_the_model_is_always_accepted(model: LanguageModel) -> None:
    options = {"sampler": Sample(temperature=1.3, top_k=50), "max_new_tokens": 41, "draft": DraftModel(model, 4)}
    for row in generate_tokens(model, BYTES, [[65], [66, 67]], **options):
        # p and q differ by the rounding of passes of different lengths, about 1e-6
        assert row.proposed == 32
        assert row.accepted == 32


def test_the_log_says_how_good_the_draft_was(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sky_core.generation"):
        generate_tokens(counting(), BYTES, [[3]], sampler=Greedy(), max_new_tokens=60, draft=PromptLookup(4))
        generate_tokens(counting(), BYTES, [[3]], sampler=Greedy(), max_new_tokens=60)
    lines = [record.getMessage() for record in caplog.records if record.name == "sky_core.generation"]
    assert lines == ["draft: 35 of 35 tokens accepted (100 %), 2.40 tokens per pass of the model"]


# passes


def test_rows_near_the_end_of_the_cache_do_not_make_room_for_the_padding_of_others(model: LanguageModel) -> None:
    lengths, widths = [60, 3, 62, 0, 50], [4, 9, 1, 30, 2]
    tokens_BT = torch.randint(0, 256, (5, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = model.new_cache(5)
        valid_BT = torch.arange(62) < torch.tensor(lengths)[:, None]
        model.hidden(tokens_BT[:, :62], valid_BT=valid_BT, cache=cache)
        blocks = [tokens_BT[b, n : n + w].tolist() for b, (n, w) in enumerate(zip(lengths, widths, strict=True))]
        hidden_BTD, cache = extend(model, blocks, cache)
        assert cache.lengths == [n + w for n, w in zip(lengths, widths, strict=True)]
        for b, (n, w) in enumerate(zip(lengths, widths, strict=True)):
            expected_TD = model.hidden(tokens_BT[b : b + 1, : n + w])[0, n:]
            # fp32 sums in another order: a few units in the last place
            torch.testing.assert_close(hidden_BTD[b, :w], expected_TD, rtol=1e-4, atol=1e-5)


# what is refused


def refuse(message: str, model: LanguageModel, **options: Any) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, BYTES, "a", max_new_tokens=5, **options)


def test_drafts_that_cannot_serve_are_refused_before_the_first_token(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_model(257)
    refuse("no modules of multi-token prediction", plain, draft="mtp")
    refuse("vocabulary has 40 ids, the model's 257", model, draft=tiny_model(40))
    refuse("context of 8 is too short for 5 tokens", model, draft=tiny_model(257, max_length=8), draft_tokens=5)
    refuse("draft_tokens is 0", model, draft="lookup", draft_tokens=0)
    refuse("nowhere", model, draft="nowhere")
    monkeypatch.setattr(drafts, "load", lambda source: (plain, CharTokenizer("abc")))
    refuse(r"draft tiny reads with the tokenizer \w{16}, the model with \w{16}", model, draft="tiny")


def test_a_sampler_that_states_no_probabilities_is_refused(model: LanguageModel) -> None:
    class Dice(Greedy):
        def build(self) -> Callable[..., torch.Tensor]:
            return lambda logits_BV, tokens, generator: logits_BV.argmax(-1)

    assert generate(model, BYTES, "a", max_new_tokens=5, sampler=Dice())
    refuse("does not state the probabilities", model, sampler=Dice(), draft="lookup")


@pytest.mark.parametrize("draft", ["lookup", "mtp"])
def test_a_state_that_cannot_go_back_is_refused(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, draft: str
) -> None:
    monkeypatch.setattr(KVCache, "rewind", LayerCache.rewind)
    assert generate(model, BYTES, "a", max_new_tokens=5)
    refuse("KVCache cannot take tokens back.*generate without a draft", model, draft=draft)


def test_a_draft_is_named_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_model(257)
    monkeypatch.setattr(drafts, "load", lambda source: (other, ByteTokenizer()))
    made = [make_draft(source, BYTES, 3) for source in ("lookup", "mtp", "a-run", Path("a-run"), other)]
    assert [type(draft) for draft in made] == [PromptLookup, MtpDraft, DraftModel, DraftModel, DraftModel]
    assert all(draft.tokens == 3 for draft in made)
    assert make_draft(made[0], BYTES, 9) is made[0]


def test_a_draft_in_training_is_left_in_training(model: LanguageModel) -> None:
    other = tiny_model(257, dropout=0.5).train()
    plain = generate(model, BYTES, "to be", temperature=0, max_new_tokens=20)
    assert generate(model, BYTES, "to be", temperature=0, max_new_tokens=20, draft=other) == plain
    assert all(module.training for module in other.modules())
