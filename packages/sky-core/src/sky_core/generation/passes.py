"""Passes of rows of different lengths through a model and into its cache.

B rows, T time (tokens), K last positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from sky_core.model.cache import Cache

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel

Run = Callable[[list[int], Cache], torch.Tensor]
"""`run(rows, cache) -> y_BTD`: one pass of those rows of a batch, `cache` holding these rows alone."""


def extend(model: LanguageModel, blocks: Sequence[Sequence[int]], cache: Cache) -> tuple[torch.Tensor, Cache]:
    """Take a block of tokens (at least one) of each row into the cache: hidden_BTD, padded on the right, and the cache.

    Where one pass would not do (see `in_groups`) the returned cache is a new one.
    """

    def run(rows: list[int], cache: Cache) -> torch.Tensor:
        return take_in(model, [blocks[row] for row in rows], cache)

    return in_groups(cache, [len(block) for block in blocks], run)


def take_in(model: LanguageModel, blocks: Sequence[Sequence[int]], cache: Cache) -> torch.Tensor:
    """Take a block of tokens (at least one) of each row into the cache in one pass: hidden_BTD, padded on the right."""
    tokens_BT, valid_BT = padded(blocks, next(model.parameters()).device)
    return model.hidden(tokens_BT, valid_BT=valid_BT, cache=cache)


def prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], cache: Cache) -> torch.Tensor:
    """Take whole prompts into an empty cache: logits_BV of what follows each."""
    hidden_BTD = take_in(model, prompts, cache)
    return model.logits(last(hidden_BTD, [len(prompt) for prompt in prompts], 1))[:, 0]


def in_groups(cache: Cache, widths: Sequence[int], run: Run) -> tuple[torch.Tensor, Cache]:
    """`run` on the whole batch at once, or on parts of it that each fit: outputs and cache, rows in their order.

    Row b brings `widths[b]` tokens. A pass is as wide as its widest row, and the padding of the others needs room too:
    rows near the end of the cache may have to go apart. Rows that begin go apart from rows that go on, so that one
    long prompt does not make the pass of all others as long.
    """
    groups = _groups(cache, widths)
    if len(groups) == 1:
        return run(groups[0], cache), cache
    parts = [cache.select(rows) for rows in groups]
    outputs = [run(rows, part) for rows, part in zip(groups, parts, strict=True)]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.join(part)
    order = [row for rows in groups for row in rows]
    back = sorted(range(len(order)), key=order.__getitem__)
    longest = max(output.shape[1] for output in outputs)
    wide_BTD = torch.cat([pad(output, (0, 0, 0, longest - output.shape[1])) for output in outputs])
    return wide_BTD[back], joined.select(back)


def _groups(cache: Cache, widths: Sequence[int]) -> list[list[int]]:
    """Rows that go together; the widest first, each with the first group that it fits."""
    everything = list(range(len(widths)))
    if len({length == 0 for length in cache.lengths}) == 1 and max(cache.lengths) + max(widths) <= cache.max_length:
        return [everything]
    groups: list[list[int]] = []
    longest: list[int] = []
    for row in sorted(everything, key=lambda row: -widths[row]):
        length = cache.lengths[row]
        for i, group in enumerate(groups):
            begins = cache.lengths[group[0]] == 0
            if begins == (length == 0) and max(longest[i], length) + widths[group[0]] <= cache.max_length:
                group.append(row)
                longest[i] = max(longest[i], length)
                break
        else:
            groups.append([row])
            longest.append(length)
    return groups


def padded(blocks: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """tokens_BT, and valid_BT where blocks differ in length (padding, on the right, is then id 0)."""
    lengths = [len(block) for block in blocks]
    longest = max(lengths)
    tokens_BT = torch.tensor([[*block, *[0] * (longest - len(block))] for block in blocks], device=device)
    if min(lengths) == longest:
        return tokens_BT, None
    return tokens_BT, torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]


def last(hidden_BTD: torch.Tensor, lengths: Sequence[int], counts: Sequence[int] | int) -> torch.Tensor:
    """hidden_BKD: the last `counts[b]` of the first `lengths[b]` positions of row b, then its very last again."""
    if hidden_BTD.shape[1] == 1:
        return hidden_BTD
    if isinstance(counts, int):
        counts = [counts] * len(lengths)
    device = hidden_BTD.device
    last_B1 = torch.tensor(lengths, device=device)[:, None] - 1
    first_B1 = last_B1 + 1 - torch.tensor(counts, device=device)[:, None]
    index_BK = torch.minimum(first_B1 + torch.arange(max(counts), device=device), last_B1)
    return hidden_BTD.take_along_dim(index_BK[:, :, None], dim=1)
