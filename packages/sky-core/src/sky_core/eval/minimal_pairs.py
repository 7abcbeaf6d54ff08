"""Minimal pairs: of two sentences that differ in one point the model should give the good one more probability.

Warstadt et al. 2020, BLiMP (arXiv:1912.00582), section 4.1: accuracy is the share of pairs with
log p(good) > log p(bad), each the sum over the whole sentence behind the end-of-text token (or behind `prefix`). The
sums are not divided by length: pairs are made to be of about equal length. Chance is 1/2.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from sky_core.errors import DataError, UserError
from sky_core.eval.items import Record, chosen, read_records
from sky_core.eval.score import Autocast, encode_pair, score_tokens
from sky_core.eval.statistics import mean_stderr, named

if TYPE_CHECKING:
    from sky_core.components.evaluation import MinimalPairs
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer


class Pair(NamedTuple):
    good: str
    bad: str
    category: str
    where: str


def minimal_pairs(
    model: LanguageModel,
    tokenizer: Tokenizer,
    _dataset: Any = None,
    autocast: Autocast = nullcontext,
    *,
    options: MinimalPairs,
) -> dict[str, float]:
    """`accuracy` with its standard error, and `items`, as `<options.name>/<metric>`; the same for each category as
    `<options.name>/<category>/<metric>`.

    Raises `DataError` for a pair that cannot be used, naming its line.
    """
    pairs = chosen([_pair(record) for record in read_records(options.path)], options.max_items, lambda p: repr(p[:2]))
    encoded = []
    for pair in pairs:
        try:
            encoded += [
                encode_pair(tokenizer, options.prefix, text, model.max_length) for text in (pair.good, pair.bad)
            ]
        except UserError as error:
            hint = "" if tokenizer.end_of_text is not None else ', or set prefix (such as "\\n")'
            raise DataError(f"{pair.where}: {error}{hint}") from error
    scores = score_tokens(model, encoded, autocast, batch_tokens=options.batch_tokens)
    right = [good.logprob > bad.logprob for good, bad in zip(scores[::2], scores[1::2], strict=True)]
    by_category: dict[str, list[bool]] = defaultdict(list)
    for pair, correct in zip(pairs, right, strict=True):
        if pair.category:
            by_category[pair.category].append(correct)
    results = _accuracy(options.name, right)
    for category in sorted(by_category):
        results |= _accuracy(f"{options.name}/{category}", by_category[category])
    return results


def _accuracy(prefix: str, right: list[bool]) -> dict[str, float]:
    return {**named(f"{prefix}/accuracy", *mean_stderr(right)), f"{prefix}/items": float(len(right))}


def _pair(record: Record) -> Pair:
    good, bad = record.text("good", "sentence_good"), record.text("bad", "sentence_bad")
    if not good or not bad:
        record.fail("a sentence is empty")
    if good == bad:
        record.fail("both sentences are the same")
    category = record.optional_text("category", "linguistics_term").replace("/", "-")
    return Pair(good, bad, category, record.where)
