"""Scores of continuations: what the logits of one sequence at a time say, whatever the batch, and nothing disturbed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sky_core.errors import DataError, UserError
from sky_core.eval.score import batches, encode_pair, loglikelihoods, score_tokens
from sky_core.model.language_model import LanguageModel
from sky_core.testing.workbench import generators_untouched, tiny_model
from sky_core.tokenizer.bpe import BpeTokenizer
from sky_core.tokenizer.byte import ByteTokenizer

BYTES = ByteTokenizer()
BPE = BpeTokenizer.train(["the cat sat on the mat and the dog sat on the log"] * 3, 277)
TEXT = st.text(alphabet="the catsondgl \n", max_size=40)


def one_by_one(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """In float64, from nothing but the logits of that one sequence."""
    whole = (context + continuation)[-model.max_length - 1 :]
    with torch.no_grad():
        logprob_TV = model(torch.tensor([whole[:-1]]))[0].double().log_softmax(-1)[-len(continuation) :]
    picked = logprob_TV[torch.arange(len(continuation)), continuation]
    return float(picked.sum()), logprob_TV.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_the_scores_are_those_of_each_sequence_alone(tiny_model: LanguageModel, batch_tokens: int) -> None:
    texts = ["", "a", "the cat", "the cat sat on the mat and the dog sat on the log, on and on and on and on"]
    pairs = [(context, continuation) for context in texts for continuation in (" x", " log", " and a cat")]
    found = loglikelihoods(tiny_model, BYTES, pairs, batch_tokens=batch_tokens)
    model = tiny_model.double()
    for (context, continuation), score in zip(pairs, found, strict=True):
        logprob, greedy = one_by_one(model, BYTES.encode(context) or [BYTES.end_of_text], BYTES.encode(continuation))
        # fp32 sums of ten terms against float64: 1e-5 relative
        assert score.logprob == pytest.approx(logprob, rel=1e-5)
        assert (score.greedy, score.tokens) == (greedy, len(continuation))


def test_what_the_model_would_write_is_greedy(tiny_model: LanguageModel) -> None:
    context = BYTES.encode("the cat")
    written: list[int] = []
    for _ in range(5):
        with torch.no_grad():
            written.append(int(tiny_model(torch.tensor([context + written]))[0, -1].argmax()))
    wrong = [*written[:-1], (written[-1] + 1) % 256]
    right, other = score_tokens(tiny_model, [(context, written), (context, wrong)])
    assert (right.greedy, other.greedy) == (True, False)
    assert right.logprob > other.logprob


def test_the_start_of_a_long_context_is_dropped(tiny_model: LanguageModel) -> None:
    newest = "x" * 60 + "abcd"
    pairs = [(dropped + newest, " end") for dropped in ("", "q" * 100)]
    cut, longer = loglikelihoods(tiny_model, BYTES, [(newest[3:], " end"), pairs[1]])
    assert tiny_model.max_length == 64
    assert longer.logprob == pytest.approx(cut.logprob, rel=1e-5)
    everything = loglikelihoods(tiny_model, BYTES, [("", "z" * 64)])
    assert everything[0].tokens == 64
    with pytest.raises(DataError, match=r"65 tokens are to be predicted.*context is 64"):
        loglikelihoods(tiny_model, BYTES, [("", "z" * 65)])


@settings(max_examples=200, deadline=None)
@given(context=TEXT, continuation=TEXT.filter(bool))
def test_context_and_continuation_are_the_tokens_of_the_whole(context: str, continuation: str) -> None:
    for tokenizer in (BYTES, BPE):
        before, after = encode_pair(tokenizer, context, continuation)
        assert before
        assert after
        start = 0 if context and before != [tokenizer.end_of_text] else 1
        assert before[start:] + after == tokenizer.encode(context + continuation)
        scored = tokenizer.decode(after)
        assert scored.endswith(continuation), "every character of the continuation is scored"
        assert (context + continuation).endswith(scored)


def test_white_space_before_a_continuation_belongs_to_it() -> None:
    assert encode_pair(BPE, "the ", "cat") == encode_pair(BPE, "the", " cat")
    assert encode_pair(BYTES, "\n", "a") == ([10], [97]), "unless there is nothing else"


def test_a_token_across_the_border_is_scored_whole() -> None:
    [the] = BPE.encode("the")
    assert encode_pair(BPE, "cat t", "he") == (BPE.encode("cat"), [*BPE.encode(" the")])
    assert encode_pair(BPE, "th", "e") == ([BPE.end_of_text], [the])


def test_an_empty_context_needs_a_token_to_start_from(tiny_model: LanguageModel) -> None:
    bare = ByteTokenizer(end_of_text=False)
    with pytest.raises(UserError, match="no end-of-text token"):
        loglikelihoods(tiny_model, bare, [("", "text")])
    assert loglikelihoods(tiny_model, bare, [("\n", "text")])[0].tokens == 4


def test_an_empty_continuation_is_an_error(tiny_model: LanguageModel) -> None:
    with pytest.raises(DataError, match="nothing follows the context 'one'"):
        loglikelihoods(tiny_model, BYTES, [("one", "")])


def test_a_tokenizer_prefix_stands_before_every_context() -> None:
    class Begins(ByteTokenizer):
        bos = 7
        prompt_prefix = (7,)

    assert encode_pair(Begins(), "a", "b") == ([7, 97], [98])
    assert encode_pair(Begins(), "", "b") == ([7], [98])


def test_nothing_is_disturbed() -> None:
    model = tiny_model(BYTES.vocab_size, dropout=0.5).train()
    modes = [module.training for module in model.modules()]
    with generators_untouched():
        first, second = (loglikelihoods(model, BYTES, [("a", "b"), ("the", " cat")]) for _ in range(2))
    assert first == second
    assert [module.training for module in model.modules()] == modes


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_every_row_once_and_no_more_than_fits(lengths: list[int], batch_tokens: int) -> None:
    found = list(batches(lengths, batch_tokens))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= batch_tokens
    ordered = [lengths[i] for batch in found for i in batch]
    assert all(a >= b for a, b in pairwise(ordered))
