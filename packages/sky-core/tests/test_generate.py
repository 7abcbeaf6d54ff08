"""Generation: what comes out is what the model, the sampler and the seed say, whoever else is in the batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sky_core.components.generation import Greedy, Sample
from sky_core.errors import SkyError, UserError
from sky_core.generation.decode import generate_tokens, stream_tokens
from sky_core.generation.passes import prefill
from sky_core.generation.row import Piece
from sky_core.generation.text import encode_prompts, generate
from sky_core.generation.text_stream import TextStream
from sky_core.model.cache import Cache
from sky_core.model.language_model import LanguageModel
from sky_core.testing.workbench import tiny_model
from sky_core.tokenizer.byte import ByteTokenizer

BYTES = ByteTokenizer()
END = BYTES.end_of_text
RAGGED = [
    list(text.encode()) for text in ("a", "to be", "or not to be, that", "xyz", "whether 'tis nobler in the mind")
]


@pytest.fixture(params=["rope", "learned"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """Random weights so large that every token hangs on the whole context: a mistake anywhere changes the text."""
    return tiny_model(BYTES.vocab_size, position=request.param, initializer_range=0.3, tie_embeddings=False)


class Scripted(LanguageModel):
    """Says `script` after the first token of every row: token t of the row is followed by script[t]."""

    def __init__(self, script: bytes | list[int], max_length: int = 1000) -> None:
        super().__init__()
        self.script = torch.tensor([*script, *[END] * max_length])
        self.one = torch.nn.Parameter(torch.ones(()))
        self.vocab_size, self.max_length, self.n_layer = BYTES.vocab_size, max_length, 0

    def hidden(self, tokens_BT: torch.Tensor, *, cache: Cache, **options: Any) -> torch.Tensor:
        positions_BT = torch.tensor(cache.lengths)[:, None] + torch.arange(tokens_BT.shape[1])
        cache.advance([tokens_BT.shape[1]] * len(tokens_BT))
        return positions_BT[:, :, None].float()

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return 9.0 * self.one * torch.nn.functional.one_hot(self.script[hidden_BTD[..., 0].long()], self.vocab_size)

    def nll(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def new_cache(self, batch: int, max_length: int | None = None) -> Cache:
        return Cache([0] * batch, max_length or self.max_length, [], [])

    def compile_layers(self, **options: Any) -> None:
        raise NotImplementedError

    def n_parameters(self) -> dict[str, int]:
        raise NotImplementedError

    def flops_per_token(self, sequence_length: int) -> float:
        raise NotImplementedError


def say(text: str | bytes, **options: Any) -> str:
    script = text.encode() if isinstance(text, str) else text
    return generate(Scripted(script), BYTES, "x", temperature=0, max_new_tokens=len(script), **options)


def pieces(text: str | bytes, **options: Any) -> list[str]:
    script = text.encode() if isinstance(text, str) else text
    return list(
        generate(Scripted(script), BYTES, "x", temperature=0, max_new_tokens=len(script), stream=True, **options)
    )


def chain(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """Greedy ids by the parallel forward alone, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == END:
                break
    return ids[len(prompt) :]


# what the model says


def test_greedy_is_the_argmax_chain_of_the_parallel_forward(model: LanguageModel) -> None:
    for prompt in RAGGED:
        assert generate_tokens(model, BYTES, [prompt], sampler=Greedy(), max_new_tokens=20)[0].tokens == chain(
            model, prompt, 20
        )


def test_steps_give_the_logits_of_the_parallel_forward(model: LanguageModel) -> None:
    tokens_BT = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    lengths = [4, 11, 7]
    with torch.inference_mode():
        cache = model.new_cache(3)
        together = [prefill(model, [tokens_BT[b, :n].tolist() for b, n in enumerate(lengths)], cache)]
        for t in range(8):
            next_B = torch.stack([tokens_BT[b, n + t] for b, n in enumerate(lengths)])
            together.append(model.step(next_B, cache))
        for b, n in enumerate(lengths):
            expected = model(tokens_BT[b : b + 1, : n + 8])[0, n - 1 :]
            # fp32 sums in another order: a few units in the last place
            torch.testing.assert_close(torch.stack([x[b] for x in together]), expected, rtol=1e-4, atol=1e-5)


def test_a_greedy_row_is_the_same_alone_and_in_a_ragged_batch(model: LanguageModel) -> None:
    together = generate_tokens(model, BYTES, RAGGED, sampler=Greedy(), max_new_tokens=30)
    alone = [generate_tokens(model, BYTES, [p], sampler=Greedy(), max_new_tokens=30)[0] for p in RAGGED]
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    assert [row.text for row in together] == [row.text for row in alone]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_a_sampled_row_does_not_depend_on_the_other_rows(model: LanguageModel) -> None:
    options = {"sampler": Sample(temperature=1.0, top_p=0.95), "max_new_tokens": 25, "seed": 4}
    together = generate_tokens(model, BYTES, RAGGED, **options)
    for row in range(len(RAGGED)):
        others = [RAGGED[row] if i == row else [65 + i] * (i + 1) for i in range(row + 1)]
        assert generate_tokens(model, BYTES, others, **options)[row].tokens == together[row].tokens


def test_rows_that_end_early_leave_the_others_as_they_are(model: LanguageModel) -> None:
    options = {"sampler": Sample(temperature=1.5), "max_new_tokens": 40, "seed": 1}
    free = generate_tokens(model, BYTES, RAGGED, **options)
    stop = next(c for c in free[1].text[3:] if not any(c in other.text for other in [free[0], *free[2:]]))
    stopped = generate_tokens(model, BYTES, RAGGED, **options, stop=stop)
    assert [row.finish == "stop" for row in stopped] == [False, True, False, False, False]
    for before, after in zip(free, stopped, strict=True):
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert after.text == before.text.split(stop)[0]


def test_seeds_decide_the_sample(model: LanguageModel) -> None:
    def text(seed: int) -> str:
        return generate(model, BYTES, "a", temperature=1.0, seed=seed, max_new_tokens=30)

    assert text(0) == text(0)
    assert len({text(seed) for seed in range(5)}) == 5


def test_equal_prompts_are_prefilled_once_and_sampled_apart(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, **options: batches.append(len(x)) or hidden(x, **options))
    prompts = [[5, 6], [7], [5, 6], [5, 6]]
    together = generate_tokens(model, BYTES, prompts, max_new_tokens=12, seed=2)
    assert batches[:2] == [2, 4]
    assert len({tuple(row.tokens) for row in together}) == 4
    for row, prompt in enumerate(prompts):
        apart = generate_tokens(model, BYTES, [*([9, i] for i in range(row)), prompt], max_new_tokens=12, seed=2)
        assert apart[row].tokens == together[row].tokens


def test_log_probabilities_are_the_models_own_over_the_whole_vocabulary(model: LanguageModel) -> None:
    prompt = RAGGED[1]
    sampler = Sample(temperature=0.5, top_k=5, repetition_penalty=1.5)
    [row] = generate_tokens(model, BYTES, [prompt], sampler=sampler, max_new_tokens=10)
    with torch.no_grad():
        logprob_TV = model(torch.tensor([prompt + row.tokens]))[0].log_softmax(-1)
    expected = [logprob_TV[len(prompt) - 1 + t, token].item() for t, token in enumerate(row.tokens)]
    assert row.logprobs == pytest.approx(expected, abs=1e-4)


def test_top_p_near_zero_is_greedy(model: LanguageModel) -> None:
    greedy = generate(model, BYTES, "so", temperature=0, max_new_tokens=20)
    assert generate(model, BYTES, "so", temperature=1.0, top_p=1e-9, max_new_tokens=20) == greedy


def test_the_penalty_sees_the_prompt_and_the_new_tokens() -> None:
    class Flat(Scripted):
        def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
            falling_V = -0.1 * torch.arange(1.0, self.vocab_size + 1)
            return (self.one * falling_V).expand(*hidden_BTD.shape[:2], -1)

    [row] = generate_tokens(
        Flat(b""), BYTES, [[0, 2]], sampler=Sample(temperature=0, repetition_penalty=100.0), max_new_tokens=4
    )
    assert row.tokens == [1, 3, 4, 5]


def test_ids_past_the_tokenizers_vocabulary_are_never_chosen() -> None:
    model = Scripted([300, 301, 302])
    model.vocab_size = 512
    [row] = generate_tokens(model, BYTES, [[1]], sampler=Sample(temperature=1.0), max_new_tokens=3)
    assert max(row.tokens) < BYTES.vocab_size
    # 9 logits on one id of 512 that cannot be chosen: the others share what it leaves
    assert row.logprobs == pytest.approx([-math.log(511 + math.exp(9))] * 3, abs=1e-4)


# how it ends


def test_the_end_of_text_ends_a_row() -> None:
    [row] = generate_tokens(Scripted(b"done"), BYTES, [[1]], sampler=Greedy(), max_new_tokens=50)
    assert (row.text, row.tokens, row.finish) == ("done", [*b"done", END], "end_of_text")


def test_the_length_ends_a_row() -> None:
    [row] = generate_tokens(Scripted(b"endless"), BYTES, [[1]], sampler=Greedy(), max_new_tokens=3)
    assert (row.text, row.tokens, row.finish) == ("end", [*b"end"], "length")


def test_no_new_tokens_is_no_text(model: LanguageModel) -> None:
    assert generate(model, BYTES, ["a", "b"], max_new_tokens=0) == ["", ""]
    assert list(generate(model, BYTES, "a", max_new_tokens=0, stream=True)) == []
    assert generate(model, BYTES, [], max_new_tokens=5) == []


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        ("END", "all is well END of story", "all is well "),
        ("END", "no such thing", "no such thing"),
        ("END", "almost EN", "almost EN"),
        ("END", "ENEND", "EN"),
        ("aab", "aaaab", "aa"),
        (["four", "wo"], "one two three four", "one t"),
        (["abcd", "c"], "xabcd", "xab"),
        (["bc", "abc"], "xabc", "x"),
        ("é", "caféé", "caf"),
        ("\n\n", "a\nb\n\nc", "a\nb"),
    ],
)
def test_text_ends_before_the_stop_string(stop: str | list[str], text: str, expected: str) -> None:
    assert say(text, stop=stop) == expected
    assert "".join(pieces(text, stop=stop)) == expected


def test_the_stop_string_ends_the_row_at_once() -> None:
    [row] = generate_tokens(Scripted(b"abSTOPcd"), BYTES, [[1]], sampler=Greedy(), stop=["STOP"], max_new_tokens=50)
    assert (row.text, bytes(row.tokens), row.finish) == ("ab", b"abSTOP", "stop")


def test_a_stream_holds_back_what_may_begin_a_stop_string_and_no_more() -> None:
    assert pieces("a ST STOP", stop="STOP") == ["a", " ", "ST ", ""][:3]


def test_a_stream_gives_whole_characters_as_soon_as_they_are_whole() -> None:
    assert pieces("né 🎈!") == ["n", "é", " ", "🎈", "!"]
    assert pieces("🎈".encode()[:3]) == ["\ufffd"]


@settings(deadline=None, max_examples=50)
@example("xabcd", ["abcd", "c"], [5])
@given(
    st.text(st.sampled_from("abé🎈"), max_size=30),
    st.lists(st.text(st.sampled_from("abé🎈"), min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5)),
)
def test_text_does_not_depend_on_the_borders_of_tokens(text: str, stop: list[str], sizes: list[int]) -> None:
    class Chunks(ByteTokenizer):
        """Ids into `chunks`."""

        def decode_bytes(self, ids: Any) -> bytes:
            return b"".join(chunks[i] for i in ids)

    def run() -> tuple[str, bool]:
        stream = TextStream(Chunks(), stop)
        released = ""
        for i in range(len(chunks)):
            released += stream.push(i)
            if stream.stopped:
                return released, True
        return released + stream.flush(), False

    data, chunks, sizes = text.encode(), [], sizes or [1]
    while data:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(data[:size])
        data = data[size:]
    mine = run()
    chunks = [character.encode() for character in text]
    assert mine == run()
    if not mine[1]:
        assert mine[0] == text
        assert not any(s in text for s in stop)
    else:
        assert text.startswith(mine[0])
        assert any(text[len(mine[0]) :].startswith(s) for s in stop)


def test_streams_of_several_prompts_name_the_prompt(model: LanguageModel) -> None:
    prompts = ["a", "to be", "xyz"]
    whole = generate(model, BYTES, prompts, max_new_tokens=15, seed=3)
    parts = ["", "", ""]
    for row, text in generate(model, BYTES, prompts, max_new_tokens=15, seed=3, stream=True):
        parts[row] += text
    assert parts == whole


def test_a_stream_is_the_whole_text(model: LanguageModel) -> None:
    whole = generate(model, BYTES, "to be", max_new_tokens=30, seed=9)
    assert "".join(generate(model, BYTES, "to be", max_new_tokens=30, seed=9, stream=True)) == whole


# past the context


def test_generation_goes_on_past_the_context(model: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sky_core.generation"):
        [row] = generate_tokens(model, BYTES, [RAGGED[1]], sampler=Greedy(), max_new_tokens=200)
    assert len(row.tokens) > 100
    ids, start = list(RAGGED[1]), 0
    with torch.no_grad():
        for _ in row.tokens:
            if len(ids) - start > model.max_length:
                start = len(ids) - model.max_length // 2
            ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    assert row.tokens == ids[len(RAGGED[1]) :]
    assert [record.getMessage() for record in caplog.records] == [
        "generating past the context of 64 tokens: a full row goes on from its last 32 tokens"
    ]


def test_rows_pass_the_context_each_in_its_own_time(model: LanguageModel) -> None:
    options = {"sampler": Sample(temperature=1.0), "max_new_tokens": 130, "seed": 6}
    together = generate_tokens(model, BYTES, RAGGED, **options)
    for row, prompt in enumerate(RAGGED):
        padded = [[1]] * row + [prompt]
        assert generate_tokens(model, BYTES, padded, **options)[row].tokens == together[row].tokens


def test_a_prompt_as_long_as_the_context_is_the_longest(model: LanguageModel) -> None:
    assert len(generate_tokens(model, BYTES, [[65] * 64], sampler=Greedy(), max_new_tokens=3)[0].tokens) == 3
    with pytest.raises(UserError, match=r"prompt 1 has 65 tokens, more than the model's context of 64"):
        generate(model, BYTES, ["a", "b" * 65])


def test_joined_caches_go_on_as_each_alone(model: LanguageModel) -> None:
    with torch.inference_mode():
        first, second = model.new_cache(1), model.new_cache(2)
        prefill(model, [RAGGED[0]], first)
        prefill(model, RAGGED[1:3], second)
        both = first.join(second)
        assert both.lengths == [len(prompt) for prompt in RAGGED[:3]]
        together = model.step(torch.tensor([7, 8, 9]), both)
        apart = torch.cat([model.step(torch.tensor([7]), first), model.step(torch.tensor([8, 9]), second)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


# what it leaves behind, and what it refuses


def test_the_model_and_the_generators_are_left_as_they_were(model: LanguageModel) -> None:
    model.train()
    frozen = next(module for module in model.modules() if module is not model)
    frozen.eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    generate(model, BYTES, ["a", "bc"], max_new_tokens=3)
    stream = generate(model, BYTES, "a", max_new_tokens=30, stream=True)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    assert not any(module.training for module in model.modules())
    stream.close()
    del stream
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_trains_on_after_generating(model: LanguageModel) -> None:
    generate(model, BYTES, "abc", max_new_tokens=3)
    model.train()
    tokens_BT = torch.tensor([RAGGED[1]])
    model.nll(model.hidden(tokens_BT), tokens_BT).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_generation_runs_in_bf16(model: LanguageModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rows = generate_tokens(model, BYTES, RAGGED, sampler=Sample(top_p=0.9), max_new_tokens=90)
    assert max(len(row.tokens) for row in rows) == 90, "past the context of 64"
    prompt = RAGGED[1]
    with torch.no_grad():
        exact_TV = model(torch.tensor([(prompt + rows[1].tokens)[:64]]))[0].log_softmax(-1)
    expected = [exact_TV[len(prompt) - 1 + t, rows[1].tokens[t]].item() for t in range(50)]
    # bf16 keeps 8 bits: logits of order 1 are off by some 1e-2
    assert rows[1].logprobs[:50] == pytest.approx(expected, abs=0.05)


def test_an_empty_prompt_starts_from_the_end_of_text(model: LanguageModel) -> None:
    assert (
        generate(model, BYTES, "", temperature=0, max_new_tokens=10)
        == generate_tokens(model, BYTES, [[END]], sampler=Greedy(), max_new_tokens=10)[0].text
    )
    with pytest.raises(UserError, match="give a prompt"):
        generate(model, ByteTokenizer(end_of_text=False), "")


def test_prompts_begin_as_the_tokenizer_begins_a_text(model: LanguageModel) -> None:
    class Begun(ByteTokenizer):
        prompt_prefix = (7,)

    assert encode_prompts(Begun(), ["a", ""]) == [[7, 97], [7]]
    assert encode_prompts(Begun(end_of_text=False), [""]) == [[7]]
    assert generate(model, Begun(), "a", temperature=0, max_new_tokens=10) == generate(
        model, BYTES, "\x07a", temperature=0, max_new_tokens=10
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: .*, got -1"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": ["a", ""]}, "stop string is empty"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"sampler": Greedy(), "top_k": 3}, "top_k"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_options_that_cannot_be_are_refused_at_once(
    model: LanguageModel, options: dict[str, Any], message: str, stream: bool
) -> None:
    with pytest.raises(UserError, match=message):
        generate(model, BYTES, "a", stream=stream, **options)


def test_prompts_the_model_cannot_read_are_refused(model: LanguageModel) -> None:
    for prompt, message in [([], "is empty"), ([1, 257], "outside the model's vocabulary of 257"), ([-1], "outside")]:
        with pytest.raises(UserError, match=message):
            stream_tokens(model, BYTES, [prompt])


@pytest.mark.parametrize("sampler", [Greedy(), Sample(top_p=0.9, min_p=0.1)])
def test_logits_that_are_not_finite_are_an_error(model: LanguageModel, sampler: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(SkyError, match="no finite probability"):
        generate(model, BYTES, "a", sampler=sampler)


def test_pieces_say_what_happened() -> None:
    stream: Iterator[Piece] = stream_tokens(Scripted(b"hi"), BYTES, [[1]], sampler=Greedy(), max_new_tokens=9)
    assert [(p.row, p.token, p.text, p.finish) for p in stream] == [
        (0, ord("h"), "h", None),
        (0, ord("i"), "i", None),
        (0, END, "", "end_of_text"),
    ]
