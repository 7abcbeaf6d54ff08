"""Choosing how a text goes on: the choice to which the model gives the highest log-probability.

    accuracy         the most likely choice is the right one
    accuracy_norm    log-probabilities divided by the bytes of the choice, which makes up for length (byte-length
                     normalisation of Gao 2021, "Multiple Choice Normalization in LM Evaluation"; with characters that
                     is lm-evaluation-harness' `acc_norm`)
    chance           what guessing gets: the mean of 1 / choices

One space is put between context and choice where neither brings white space. Of equal choices the first is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from sky_core.errors import DataError, UserError
from sky_core.eval.items import Record, chosen, read_records
from sky_core.eval.score import Autocast, encode_pair, score_tokens
from sky_core.eval.statistics import mean_stderr, named

if TYPE_CHECKING:
    from sky_core.components.evaluation import Cloze
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer


class Question(NamedTuple):
    """`choices` begin with the white space that separates them from `context`."""

    context: str
    choices: list[str]
    answer: int
    where: str


def cloze(
    model: LanguageModel,
    tokenizer: Tokenizer,
    _dataset: Any = None,
    autocast: Autocast = nullcontext,
    *,
    options: Cloze,
) -> dict[str, float]:
    """The metrics above, accuracies with their standard errors, and `items`, each as `<options.name>/<metric>`.

    Raises `DataError` for an item that cannot be used, naming its line.
    """
    questions = [_question(record) for record in read_records(options.path)]
    questions = chosen(questions, options.max_items, lambda question: repr(question[:3]))
    pairs = []
    for question in questions:
        try:
            pairs += [encode_pair(tokenizer, question.context, choice, model.max_length) for choice in question.choices]
        except UserError as error:
            raise DataError(f"{question.where}: {error}") from error
    scores = score_tokens(model, pairs, autocast, batch_tokens=options.batch_tokens)
    borders = accumulate((len(question.choices) for question in questions), initial=0)
    right: list[bool] = []
    right_norm: list[bool] = []
    for question, (start, stop) in zip(questions, pairwise(borders), strict=True):
        logprobs = [score.logprob for score in scores[start:stop]]
        sizes = [len(choice.strip().encode()) for choice in question.choices]
        right.append(_best(logprobs) == question.answer)
        right_norm.append(_best([a / b for a, b in zip(logprobs, sizes, strict=True)]) == question.answer)
    results = {
        **named("accuracy", *mean_stderr(right)),
        **named("accuracy_norm", *mean_stderr(right_norm)),
        "chance": mean_stderr([1 / len(question.choices) for question in questions])[0],
        "items": float(len(questions)),
    }
    return {f"{options.name}/{metric}": value for metric, value in results.items()}


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def _question(record: Record) -> Question:
    context = record.text("context", "prompt")
    _, choices = record.first("choices")
    _, answer = record.first("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        record.fail(f"'choices' must be a list of at least two strings, it is {choices!r:.40}")
    if empty := [i for i, choice in enumerate(choices) if not choice.strip()]:
        record.fail(f"choice {empty[0]} is empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        record.fail(f"'answer' must be the index of a choice, 0 to {len(choices) - 1}, it is {answer!r:.40}")
    glued = [choice if context[-1:].isspace() or choice[0].isspace() else f" {choice}" for choice in choices]
    return Question(context, glued if context else choices, answer, record.where)
