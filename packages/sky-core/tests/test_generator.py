"""Continuous batching: what comes of a request is its own affair, whoever comes and goes beside it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sky_core.components.generation import Greedy, Sample
from sky_core.errors import UserError
from sky_core.generation.decode import generate_tokens
from sky_core.generation.generator import Generator
from sky_core.generation.row import Generation, Piece
from sky_core.generation.sampling import TokenSampler, row_generator
from sky_core.generation.text import generate
from sky_core.model.cache import LayerCache
from sky_core.model.context import Context
from sky_core.model.language_model import LanguageModel
from sky_core.testing.workbench import tiny_model
from sky_core.tokenizer.byte import ByteTokenizer
from sky_core.tokenizer.char import CharTokenizer

BYTES = ByteTokenizer()
LARGE = {"initializer_range": 0.3, "tie_embeddings": False}
"""Random weights so large that every token hangs on the whole context: a mistake anywhere changes the text."""
RAGGED = [
    list(text.encode()) for text in ("a", "to be", "or not to be, that", "xyz", "whether 'tis nobler in the mind")
]
SAMPLERS = [Greedy(), Sample(temperature=1.0), Sample(temperature=1.3, top_k=20, repetition_penalty=1.2)]
LONG = list(b"a sentence that many prompts begin with, longer than what is worth reading again: ")[:48]
KINDS: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned": {"position": "learned"},
    "alibi": {"position": "alibi"},
    "grouped": {"n_kv_head": 1, "qk_norm": "head"},
    "window": {"attention": [{"kind": "full", "window": 5}, "full"]},
    "capped": {"attention": {"kind": "full", "softcap": 20.0}},
    "experts": {"feedforward": {"kind": "moe", "n_experts": 4, "top_k": 2}},
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(BYTES.vocab_size, **LARGE)


def alone(model: LanguageModel, prompt: list[int], count: int, sampler: Any = None, seed: int = 0, i: int = 0) -> list:
    """The tokens of sample i by the parallel forward alone: no cache, no batch, read again once past the context."""
    choose, generator = (sampler or Sample()).build(), row_generator(seed, i)
    ids, start = list(prompt), 0
    with torch.no_grad():
        for _ in range(count):
            if len(ids) - start > model.max_length:
                start = len(ids) - model.max_length // 2
            logits_BV = model(torch.tensor([ids[start:]]))[:, -1]
            ids.append(int(choose(logits_BV, [ids], [generator])))
            if ids[-1] == BYTES.end_of_text:
                break
    return ids[len(prompt) :]


class Passes:
    """How many tokens, padding aside, each row of each pass of a model brought."""

    def __init__(self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.widths: list[list[int]] = []
        self._hidden = model.hidden
        monkeypatch.setattr(model, "hidden", self)

    def __call__(self, tokens_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        valid_BT = options.get("valid_BT")
        counts = torch.full((len(tokens_BT),), tokens_BT.shape[1]) if valid_BT is None else valid_BT.sum(1)
        self.widths.append(counts.tolist())
        return self._hidden(tokens_BT, **options)

    def tokens(self) -> int:
        return sum(map(sum, self.widths))


def tokens(found: list[Generation]) -> list[list[int]]:
    return [generation.tokens for generation in found]


def storages(generator: Generator) -> list[int]:
    cache = generator._pool.cache
    return [tensor.data_ptr() for state in cache.layers if state is not None for tensor in state.tensors().values()]


# the same tokens as alone

SMALL = CharTokenizer("abcd", byte_fallback=False, end_of_text=False)
TARGET = tiny_model(4, max_length=12, **LARGE)
COMPILED = copy.deepcopy(TARGET)  # in the one way that shows: its steps pass over idle places
COMPILED.rows_of_step = lambda rows: 1 << (rows - 1).bit_length()
REQUEST = st.tuples(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),  # prompt
    st.integers(1, 20),  # new tokens, past the context of 12
    st.integers(0, 2),  # sampler
    st.integers(1, 3),  # samples
    st.integers(0, 3),  # steps before the next one comes
    st.booleans(),  # taken back half-way
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(REQUEST, min_size=1, max_size=6),
    st.integers(1, 5),
    st.sampled_from([1, 3, 8, None]),
    st.sampled_from([TARGET, COMPILED]),
)
def test_any_schedule_gives_what_each_request_gives_alone(
    requests: list, rows: int, chunk: int | None, target: LanguageModel
) -> None:
    generator = Generator(target, SMALL, rows=rows, prefill_chunk=chunk)
    generator._pool.worth = 2
    found: dict[tuple[int, int], list[int]] = {}
    cancelled = set()

    def step() -> None:
        for piece in generator.step():
            found.setdefault((piece.request, piece.row), []).append(piece.token)

    for request, (prompt, count, sampler, samples, wait, cancel) in enumerate(requests):
        own = {"sampler": SAMPLERS[sampler], "seed": request, "count": samples}
        assert generator.submit(prompt, max_new_tokens=count, **own) == request
        for _ in range(wait):
            step()
        if cancel and generator.cancel(request):
            cancelled.add(request)
    while not generator.idle:
        step()
    for request, (prompt, count, sampler, samples, _, _) in enumerate(requests):
        for i in range(samples):
            got = found.get((request, i), [])
            assert len(got) == count or request in cancelled
            assert got == alone(TARGET, prompt, len(got), SAMPLERS[sampler], request, i)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_kind_of_model_says_what_it_says_alone(options: dict[str, Any]) -> None:
    """70 tokens go past the context of 64; three places for five requests of two samples."""
    model = tiny_model(BYTES.vocab_size, **LARGE, **options)
    generator = Generator(model, BYTES, rows=3, prefill_chunk=5)
    requests = {
        generator.submit(prompt, max_new_tokens=count, sampler=SAMPLERS[i % 3], seed=i, count=2): (prompt, count, i)
        for i, (prompt, count) in enumerate(zip(RAGGED, (9, 70, 20, 4, 30), strict=True))
    }
    found = generator.run()
    for request, (prompt, count, i) in requests.items():
        for sample in range(2):
            assert found[request][sample].tokens == alone(model, prompt, count, SAMPLERS[i % 3], i, sample)


def test_samples_are_those_of_generate_tokens_with_text_and_logprobs(model: LanguageModel) -> None:
    generator = Generator(model, BYTES, rows=2)
    request = generator.submit(RAGGED[1], max_new_tokens=30, seed=7, count=5, stop="e")
    other = generator.submit(RAGGED[1], max_new_tokens=30, seed=7, count=2, first=3, stop="e")
    found = generator.run()
    expected = generate_tokens(model, BYTES, [RAGGED[1]] * 5, max_new_tokens=30, seed=7, stop="e")
    for ours, theirs in zip([*found[request], *found[other]], [*expected, *expected[3:]], strict=True):
        assert (ours.tokens, ours.text, ours.finish) == (theirs.tokens, theirs.text, theirs.finish)
        # fp32 sums in another order: logits of order 10, a few units in the last place
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_keys_in_front_are_seen_by_every_request(model: LanguageModel) -> None:
    """The tap of prefix tuning: two keys of a layer that every query sees."""
    torch.manual_seed(0)
    k_BHPE, v_BHPE = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8)
    tuned = tiny_model(BYTES.vocab_size, **LARGE)

    def tap(ctx: Context) -> None:
        ctx.prefixes[1] = (k_BHPE, v_BHPE)

    tuned.context_hooks.append(tap)
    generator = Generator(tuned, BYTES, rows=2, prefill_chunk=4)
    requests = [generator.submit(prompt, max_new_tokens=12, sampler=Greedy()) for prompt in RAGGED]
    found = generator.run()
    for request, prompt in zip(requests, RAGGED, strict=True):
        assert found[request][0].tokens == alone(tuned, prompt, 12, Greedy())
    assert found[requests[1]][0].tokens != alone(model, RAGGED[1], 12, Greedy())


def test_a_cache_shorter_than_the_context_slides_by_its_own_length(model: LanguageModel) -> None:
    short = tiny_model(BYTES.vocab_size, max_length=20, **LARGE)
    generator = Generator(model, BYTES, rows=2, max_length=20)
    requests = [generator.submit(prompt, max_new_tokens=50, sampler=Greedy()) for prompt in RAGGED[:4]]
    found = generator.run()
    for request, prompt in zip(requests, RAGGED, strict=False):
        assert found[request][0].tokens == alone(short, prompt, 50, Greedy())


def test_text_in_bf16_goes_on_past_the_context(model: LanguageModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        generator = Generator(model, BYTES, rows=2, prefill_chunk=8)
        assert generator._pool.cache.layers[0].tensors()["k"].dtype == torch.bfloat16
        for prompt in RAGGED:
            generator.submit(prompt, max_new_tokens=70)
        lengths = [len(generation.tokens) for [generation] in generator.run().values()]
    assert max(lengths) == 70


def test_prompts_read_in_chunks_say_what_they_say_read_at_once(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a", "b" * 40, "to be or not to be, that is the question"]
    whole = generate(model, BYTES, prompts, max_new_tokens=20, temperature=0)
    passes = Passes(model, monkeypatch)
    assert generate(model, BYTES, prompts, max_new_tokens=20, temperature=0, prefill_chunk=7) == whole
    assert max(map(sum, passes.widths)) == 7
    with pytest.raises(UserError, match="leave out prefill_chunk"):
        generate(model, BYTES, "a", prefill_chunk=7, draft="lookup")


# what is read, and how often


def test_samples_of_one_prompt_read_it_once(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(model, monkeypatch)
    for chunk, reads in ((None, [[48]]), (20, [[20], [20], [8]])):
        generator = Generator(model, BYTES, rows=6, prefill_chunk=chunk)
        generator.submit(LONG, max_new_tokens=3, sampler=Greedy(), count=4)
        generator.submit(LONG, max_new_tokens=3, sampler=Greedy(), seed=1)
        passes.widths.clear()
        generator.run()
        assert passes.widths == [*reads, [1] * 5, [1] * 5]


def test_samples_that_come_later_start_from_a_copy(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(model, monkeypatch)
    generator = Generator(model, BYTES, rows=3, prefill_chunk=20)
    request = generator.submit(LONG, max_new_tokens=2, count=9)
    found = generator.run()
    # three at a time: the first reads it whole, two others its last token; then one token of each sample goes in
    assert passes.tokens() == 48 + 2 + 9
    assert tokens(found[request]) == [alone(model, LONG, 2, i=i) for i in range(9)]


def test_samples_of_several_prompts_get_each_a_copy_of_its_own(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(model, monkeypatch)
    generator = Generator(model, BYTES, rows=8)
    requests = [generator.submit(prompt, max_new_tokens=6, sampler=Greedy(), count=2) for prompt in RAGGED[:4]]
    found = generator.run()
    assert passes.widths[0] == [len(prompt) for prompt in RAGGED[:4]]
    for request, prompt in zip(requests, RAGGED, strict=False):
        assert tokens(found[request]) == [alone(model, prompt, 6, Greedy())] * 2


def test_a_copied_beginning_and_a_long_prompt_that_do_not_fit_beside_each_other_go_apart(model: LanguageModel) -> None:
    generator = Generator(model, BYTES, rows=4)
    generator.submit(LONG, max_new_tokens=12, sampler=Greedy())
    generator.step()
    prompts = [[*LONG, 5], [9] * 30]
    requests = [generator.submit(prompt, max_new_tokens=6, sampler=Greedy()) for prompt in prompts]
    found = generator.run()
    for request, prompt in zip(requests, prompts, strict=True):
        assert found[request][0].tokens == alone(model, prompt, 6, Greedy())


def test_a_common_beginning_is_read_once(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(model, monkeypatch)
    prompts = [LONG[:30] + ending for ending in RAGGED]
    generator = Generator(model, BYTES, rows=8, prefill_chunk=200)
    requests = [generator.submit(prompt, max_new_tokens=1, sampler=Greedy()) for prompt in prompts]
    found = generator.run()
    assert passes.widths[0] == [31], "the others wait for what they share"
    assert passes.tokens() == 30 + sum(map(len, RAGGED))
    for request, prompt in zip(requests, prompts, strict=True):
        assert found[request][0].tokens == alone(model, prompt, 1, Greedy())


def test_what_is_done_is_forgotten_with_the_last_request(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two batches of rollouts the weights change."""
    moving = tiny_model(BYTES.vocab_size, **LARGE)
    passes = Passes(moving, monkeypatch)
    generator = Generator(moving, BYTES, rows=2)
    for seed in range(2):
        moving.load_state_dict(tiny_model(BYTES.vocab_size, seed=seed, **LARGE).state_dict())
        passes.widths.clear()
        request = generator.submit(LONG, max_new_tokens=4, sampler=Greedy())
        assert tokens(generator.run()[request]) == [alone(moving, LONG, 4, Greedy())]
        assert passes.widths[0] == [48]


def answer_once_and_go_on(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second prompt that begins with the first and its answer reads what is new alone."""
    generator = Generator(model, BYTES, rows=2, remember=True)
    request = generator.submit(LONG[:20], max_new_tokens=10, sampler=Greedy())
    [answer] = generator.run()[request]
    prompt = LONG[:20] + answer.tokens + RAGGED[1]
    expected = alone(model, prompt, 10, Greedy())
    passes = Passes(model, monkeypatch)
    request = generator.submit(prompt, max_new_tokens=10, sampler=Greedy())
    assert tokens(generator.run()[request]) == [expected]
    assert passes.widths[0] == [1 + len(RAGGED[1])], "the last token of an answer was never read"


def test_a_chat_goes_on_from_its_last_answer(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_once_and_go_on(model, monkeypatch)


class Tally(LayerCache):
    """The sum of all that a layer has seen: every pass makes a new one, and none can be taken back."""

    def __init__(self, sum_BD: torch.Tensor) -> None:
        self.sum_BD = sum_BD

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"sum": self.sum_BD}

    def replace(self, tensors: dict[str, torch.Tensor]) -> Tally:
        return Tally(tensors["sum"])

    def reset(self, rows_B: torch.Tensor) -> None:
        self.sum_BD[rows_B] = 0


class RunningSum(torch.nn.Module):
    """A memory beside the attention of its layer: a share of the sum of all inputs so far."""

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        real_BTD = x_BTD if ctx.valid_BT is None else x_BTD * ctx.valid_BT[:, :, None]
        sums_BTD, state = real_BTD.cumsum(1), ctx.memory_cache(0)
        if state is not None:
            assert isinstance(state, Tally)
            sums_BTD = sums_BTD + state.sum_BD[:, None]
            state.sum_BD = sums_BTD[:, -1]
        return 0.5 * sums_BTD

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> Tally:
        return Tally(torch.zeros(batch, 16, device=device, dtype=dtype))


@pytest.fixture
def remembering() -> LanguageModel:
    model = tiny_model(BYTES.vocab_size, **LARGE)
    model.layers[0].memory = memory = RunningSum()
    model._memories = (memory, None)
    return model


def test_a_memory_that_cannot_be_cut_is_right_and_the_log_says_what_it_costs(
    remembering: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = remembering
    passes = Passes(model, monkeypatch)
    prompts = [LONG, [*LONG[:40], 1, 2], [*LONG, 5]]
    with caplog.at_level(logging.INFO, "sky_core.generation"):
        generator = Generator(model, BYTES, rows=2, prefill_chunk=100)
        requests = [generator.submit(prompt, max_new_tokens=8, sampler=Greedy(), count=2) for prompt in prompts]
        found = generator.run()
    assert [sum(widths) for widths in passes.widths if max(widths) > 1] == [48, 42, 49], "two samples read once"
    for request, prompt in zip(requests, prompts, strict=True):
        assert tokens(found[request]) == [alone(model, prompt, 8, Greedy())] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "the cache of this model cannot be cut back: a prompt that begins like another one is read in whole"
    ]


def test_a_memory_can_be_gone_on_from_whole(remembering: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_once_and_go_on(remembering, monkeypatch)


# one pass after the other


def test_running_rows_do_not_wait_for_a_long_prompt(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(model, BYTES, rows=4, prefill_chunk=10)
    short = generator.submit([1], max_new_tokens=30, sampler=Greedy())
    generator.step()
    passes = Passes(model, monkeypatch)
    generator.submit(LONG, max_new_tokens=3, sampler=Greedy())
    for _ in range(4):
        assert [piece.request for piece in generator.step()] == [short]
    assert passes.widths == [[1], [10]] * 4
    assert len(generator.step()) == 2
    assert passes.widths[-1] == [8]


def test_a_pass_takes_as_many_prompts_as_its_chunk_holds_in_their_order(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(model, monkeypatch)
    generator = Generator(model, BYTES, rows=8, prefill_chunk=20)
    for i, length in enumerate((4, 5, 3, 9, 9, 1)):
        generator.submit([i] * length, max_new_tokens=1)
    order = [piece.request for piece in generator.stream()]
    assert passes.widths == [[4, 5, 3], [9, 9], [1]]
    assert order == [0, 1, 2, 3, 4, 5]


def test_passes_carry_running_rows_alone(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(model, monkeypatch)
    generator = Generator(model, BYTES, rows=8)
    for i, count in enumerate((2, 9, 3, 6)):
        generator.submit([i], max_new_tokens=count, sampler=Greedy())
    generator.run()
    assert passes.widths == [[1] * 4, [1] * 4, [1] * 3, [1] * 2, [1] * 2, [1] * 2, [1], [1], [1]]


def test_the_cache_stays_where_it_is(model: LanguageModel) -> None:
    generator = Generator(model, BYTES, rows=3, prefill_chunk=8)
    before, size = storages(generator), generator._pool.cache.nbytes()
    for wave in range(4):
        for i, prompt in enumerate(RAGGED):
            generator.submit(prompt, max_new_tokens=1 + 20 * i, count=1 + wave, seed=wave)
        generator.run()
    assert storages(generator) == before
    assert generator._pool.cache.nbytes() == size
    assert not generator._running
    assert not generator._waiting
    assert not any(generator._pool.rows), "a row that is done is kept"


def test_equal_samplers_draw_together(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    sample = TokenSampler.__call__

    def spy(self: TokenSampler, logits_BV: torch.Tensor, rows: Sequence, generators: Any) -> torch.Tensor:
        calls.append(len(rows))
        return sample(self, logits_BV, rows, generators)

    generator = Generator(model, BYTES, rows=8)
    samplers = [Greedy(), Sample(top_k=5), Sample(top_k=5), Sample(top_k=5), Sample(top_k=6), Greedy()]
    requests = [generator.submit([i], max_new_tokens=4, sampler=sampler, seed=i) for i, sampler in enumerate(samplers)]
    monkeypatch.setattr(TokenSampler, "__call__", spy)
    found = generator.run()
    monkeypatch.undo()
    assert calls == [2, 3, 1] * 4
    for i, request in enumerate(requests):
        assert found[request][0].tokens == alone(model, [i], 4, samplers[i], seed=i)


def test_a_stream_tells_of_every_request(model: LanguageModel) -> None:
    generator = Generator(model, BYTES, rows=2)
    assert generator.idle
    assert len(generator) == 0
    one = generator.submit(RAGGED[0], max_new_tokens=5, sampler=Greedy())
    pieces: list[Piece] = []
    for piece in generator.stream():
        pieces.append(piece)
        if len(pieces) == 2:
            two = generator.submit(RAGGED[1], max_new_tokens=4, sampler=Greedy())
            assert len(generator) == 2
    assert [p.token for p in pieces if p.request == one] == alone(model, RAGGED[0], 5, Greedy())
    assert [p.token for p in pieces if p.request == two] == alone(model, RAGGED[1], 4, Greedy())
    assert [p.finish for p in pieces if p.request == two] == [None, None, None, "length"]
    assert generator.idle


def test_results_hold_what_came_before_they_were_asked_for(model: LanguageModel) -> None:
    generator = Generator(model, BYTES, rows=2)
    request = generator.submit(RAGGED[0], max_new_tokens=5, sampler=Greedy())
    generator.step()
    assert tokens(generator.run()[request]) == [alone(model, RAGGED[0], 5, Greedy())]
    assert generator.run() == {}


# what goes away


def test_what_is_taken_back_makes_room_at_once(model: LanguageModel) -> None:
    generator = Generator(model, BYTES, rows=2, prefill_chunk=10)
    first, second, third, long = (
        generator.submit(prompt, max_new_tokens=9, sampler=Greedy()) for prompt in (*RAGGED[:3], LONG)
    )
    generator.step()
    assert generator.cancel(first)
    assert not generator.cancel(first)
    found = generator._open[second]
    generator.step()
    assert [row.request for row in generator._running] == [second]
    generator.step()
    assert [row.request for row in generator._running] == [second, third]
    generator.cancel(second)
    generator.step()
    assert generator._filling is not None
    assert generator._filling.request == long
    last = generator.submit(RAGGED[4], max_new_tokens=3, sampler=Greedy())
    generator.cancel(long)
    assert generator._filling is None
    results = generator.run()
    assert results.keys() == {third, last}
    assert tokens(results[third]) == [alone(model, RAGGED[2], 9, Greedy())]
    assert tokens(results[last]) == [alone(model, RAGGED[4], 3, Greedy())]
    [cancelled] = [row.generation for row in found]
    assert cancelled.finish == "cancelled"
    assert cancelled.tokens == alone(model, RAGGED[1], len(cancelled.tokens), Greedy())


def test_a_row_that_fails_fails_alone() -> None:
    """The embedding of token 7 is not finite: the prompt that holds it fails, before and after others in its place."""
    model = tiny_model(BYTES.vocab_size, **LARGE)
    with torch.no_grad():
        model.embed_tokens.weight[7] = math.nan
    generator = Generator(model, BYTES, rows=3, prefill_chunk=10)
    prompts = [RAGGED[1], [*LONG[:20], 7, *LONG[:15]], RAGGED[2], [7], RAGGED[4], RAGGED[0], [9, 7, 9], RAGGED[3]]
    requests = [generator.submit(prompt, max_new_tokens=30, sampler=Greedy()) for prompt in prompts]
    found = generator.run()
    for request, prompt in zip(requests, prompts, strict=True):
        [generation] = found[request]
        if 7 in prompt:
            assert (generation.tokens, generation.finish) == ([], "failed")
            assert generation.error is not None
            assert f"no finite probability for token {len(prompt)}" in generation.error
        else:
            assert generation.error is None
            assert generation.tokens == alone(model, prompt, 30, Greedy())


def test_a_piece_says_that_its_row_failed() -> None:
    model = tiny_model(BYTES.vocab_size, **LARGE)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    generator = Generator(model, BYTES)
    generator.submit([1], max_new_tokens=3)
    [piece] = generator.step()
    assert (piece.token, piece.finish, piece.text) == (-1, "failed", "")
    assert generator.idle


def test_the_model_trains_on_between_steps() -> None:
    model = tiny_model(BYTES.vocab_size, dropout=0.5, **LARGE).train()
    before = torch.get_rng_state()
    generator = Generator(model, BYTES)
    request = generator.submit(RAGGED[1], max_new_tokens=5, sampler=Greedy())
    first = [piece.token for piece in generator.step()]
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    tokens_BT = torch.tensor([RAGGED[1]])
    model.nll(model.hidden(tokens_BT), tokens_BT).backward()
    [found] = generator.run()[request]
    assert found.tokens[:1] == first
    assert found.tokens == alone(model.eval(), RAGGED[1], 5, Greedy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: Generator(model, BYTES, rows=0), "rows is 0"),
        (lambda model: Generator(model, BYTES, prefill_chunk=0), "prefill_chunk is 0"),
        (lambda model: Generator(model, BYTES, max_length=65), "max_length is 65, more than the model's context of 64"),
        (lambda model: Generator(model, BYTES).submit([]), "the prompt is empty"),
        (lambda model: Generator(model, BYTES).submit([257]), "outside the model's vocabulary of 257"),
        (lambda model: Generator(model, BYTES).submit([1] * 65), "has 65 tokens, more than the model's context of 64"),
        (lambda model: Generator(model, BYTES, max_length=9).submit([1] * 10), "the generator's max_length of 9"),
        (lambda model: Generator(model, BYTES).submit([1], max_new_tokens=0), "max_new_tokens is 0"),
        (lambda model: Generator(model, BYTES).submit([1], count=0), "count is 0"),
        (lambda model: Generator(model, BYTES).submit([1], stop=["a", ""]), "stop string is empty"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(
    model: LanguageModel, make: Callable[[LanguageModel], Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(model)
