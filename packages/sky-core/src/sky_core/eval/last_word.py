"""Predicting the last word of a passage: LAMBADA (Paperno et al. 2016, arXiv:1606.06031) on any text.

A passage ends in a word that has to be guessed from everything before it. In the file of LAMBADA itself each line is a
passage chosen by people; in running text a passage is a paragraph, with the paragraphs before it as far as `min_words`
words of context need them. Punctuation behind the last word is dropped, and only words of letters (with - and ' inside)
that white space stands before are asked for.

    accuracy         the most likely token is right at every token of the word, and the token after it does not go on
                     with the word: what greedy decoding writes is this word
    accuracy_prefix  without that end, as lm-evaluation-harness counts: "the" is then right where "then" is written
    perplexity       exp(-mean log p(word)), p(word) = p(its tokens) · p(the next token does not go on with it)

The end matters the more the smaller the tokens are: without it a character model is asked for a prefix. With it the
numbers of different tokenizers compare. A token goes on with a word when it begins with a letter or a digit, or in the
middle of a character.

N scored positions, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sky_core.data.dataset import IGNORE
from sky_core.data.read import Corpus, Document
from sky_core.errors import DataError, UserError
from sky_core.eval.items import chosen
from sky_core.eval.score import Autocast, Row, encode_pair, predictions
from sky_core.eval.statistics import mean_stderr, named

if TYPE_CHECKING:
    from sky_core.components.evaluation import LastWord
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer

_LAST_WORD = re.compile(r"(?<=\s)([^\W\d_]+(?:['’-][^\W\d_]+)*)[^\w\s]*\s*\Z")


class Passage(NamedTuple):
    """`context` ends with the white space before `word`; `where` is its document."""

    context: str
    word: str
    where: str


def last_word(
    model: LanguageModel,
    tokenizer: Tokenizer,
    _dataset: Any = None,
    autocast: Autocast = nullcontext,
    *,
    options: LastWord,
) -> dict[str, float]:
    """The metrics above with their standard errors, and `items`, each as `<options.name>/<metric>`.

    Raises `DataError` when the files cannot be read or hold no passage.
    """
    passages = find_passages(options)
    pairs = [_encoded(tokenizer, passage) for passage in passages]
    rows = [Row([*context, *word], [*word, IGNORE]) for context, word in pairs]
    device = next(model.parameters()).device
    ends_V = word_ends(tokenizer, model.vocab_size).to(device)

    def look(logprob_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        first_N = logprob_NV.argmax(-1)
        behind_N = targets_N == IGNORE
        chosen_N = logprob_NV.gather(-1, targets_N.clamp(min=0)[:, None])[:, 0]
        ended_N = logprob_NV.masked_fill(~ends_V, -torch.inf).logsumexp(-1)
        right_N = torch.where(behind_N, ends_V[first_N], first_N == targets_N)
        return torch.stack([torch.where(behind_N, ended_N, chosen_N), right_N.float()], dim=-1)

    found = predictions(model, rows, look, autocast, batch_tokens=options.batch_tokens)
    right = [float(numbers_NK[:, 1].all()) for numbers_NK in found]
    prefix = [float(numbers_NK[:-1, 1].all()) for numbers_NK in found]
    logprob, stderr = mean_stderr([float(numbers_NK[:, 0].double().sum()) for numbers_NK in found])
    perplexity = math.exp(min(-logprob, 700))
    results = {
        **named("accuracy", *mean_stderr(right)),
        **named("accuracy_prefix", *mean_stderr(prefix)),
        **named("perplexity", perplexity, None if stderr is None else perplexity * stderr),
        "items": float(len(passages)),
    }
    return {f"{options.name}/{metric}": value for metric, value in results.items()}


def word_ends(tokenizer: Tokenizer, vocab_size: int) -> torch.Tensor:
    """Which tokens end the word before them: booleans over the model's vocabulary, special tokens true."""

    def ends(token: int) -> bool:
        text = tokenizer.piece_bytes(token).decode(errors="replace")
        return not text or not (text[0].isalnum() or text[0] == "\ufffd")

    return torch.tensor([token >= tokenizer.vocab_size or ends(token) for token in range(vocab_size)])


def find_passages(options: LastWord) -> list[Passage]:
    """The passages to ask for: the same ones for every model. Raises `DataError` when there are none."""
    paths = [options.path] if isinstance(options.path, str) else options.path
    found = [
        passage
        for path in paths
        for document in Corpus([path])
        for passage in _passages(document, options.passages or _unit(path), options.min_words)
        if not options.word_in_context or _occurs(passage)
    ]
    if not found:
        raise DataError(
            f"{', '.join(paths)}: no passage ends in a word of letters"
            + (" that occurred before it" if options.word_in_context else "")
            + f" with at least {options.min_words} words before it; give more text or a smaller min_words"
        )
    return chosen(found, options.max_items, lambda passage: passage.context + passage.word)


def _unit(path: str) -> str:
    return "document" if ".jsonl" in Path(path).suffixes else "paragraph"


def _passages(document: Document, unit: str, min_words: int) -> Iterator[Passage]:
    if unit == "document":
        texts: Iterable[str] = [document.text]
        min_words = 1
    else:
        texts = _with_context(re.split(r"(\n\s*\n)", document.text), min_words)
    for text in texts:
        match = _LAST_WORD.search(text)
        if match and len(text[: match.start()].split()) >= min_words:
            yield Passage(text[: match.start()], match[1], document.source)


def _with_context(parts: Sequence[str], min_words: int) -> Iterator[str]:
    """Each paragraph of `parts` (paragraph, gap, paragraph, ...) behind as many others as `min_words` need."""
    words = [len(part.split()) for part in parts]
    for last in range(0, len(parts), 2):
        first, have = last, words[last]
        while have <= min_words and first > 0:
            first -= 2
            have += words[first]
        if words[last]:
            yield "".join(parts[first : last + 1])


def _occurs(passage: Passage) -> bool:
    return re.search(rf"(?<!\w){re.escape(passage.word)}(?!\w)", passage.context, re.IGNORECASE) is not None


def _encoded(tokenizer: Tokenizer, passage: Passage) -> tuple[list[int], list[int]]:
    try:
        return encode_pair(tokenizer, passage.context, passage.word)
    except UserError as error:
        raise DataError(f"{passage.where}: {error}") from error
