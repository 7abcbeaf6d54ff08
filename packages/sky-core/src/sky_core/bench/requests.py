"""Many requests of mixed lengths: continuous batching beside batches that wait for their longest row.

Prompts and outputs have random lengths (log-uniform, fixed seed), the same for all. Ours is a `Generator` of `rows`
places that admits a request as soon as a row ends. transformers' `generate` takes the requests in order, `rows` at a
time, padded on the left, and decodes until the longest output of the batch is there: what its users write. Only tokens
that somebody asked for count (useful tokens per second).

Before anything is timed both answer the same requests in fp32: the texts must be equal, token by token. Then our
compiled steps are held to uncompiled ones in the precision that is timed, for each number of rows (`decode.py`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch

from sky_core.bench.ceilings import default_device
from sky_core.bench.contenders import contender, distributions, peers_of
from sky_core.bench.contenders.base import Contender
from sky_core.bench.contenders.ours import Ours
from sky_core.bench.decode import first_difference, same_logits, with_static
from sky_core.bench.defaults import NEW, PROMPT, ROWS, record_name
from sky_core.bench.record import Record, spread
from sky_core.bench.report import Settings, bars, finish, turns
from sky_core.bench.shape import find_shape
from sky_core.bench.timing import interleave
from sky_core.errors import CheckFailed, UserError
from sky_core.training.flops import synchronizer

TARGET_RATIO = 3.0
"""Of the issue on speed: useful tokens per second against transformers' batched generate."""

Request = tuple[list[int], int]
"""Prompt, and how many tokens shall follow it."""


def run(
    settings: Settings,
    *,
    shape: str | None,
    requests: int,
    rows: int,
    longest_prompt: int,
    longest_output: int,
    against: str,
    precision: str,
    compile: bool,
    rounds: int,
) -> None:
    """Measure and record. Raises `CheckFailed` when the contenders do not write the same."""
    if settings.smoke:
        requests, rows, longest_prompt, longest_output, rounds = 5, 2, 6, 8, 1
    peers = with_static([name for name in peers_of(against) if name == "transformers"])
    if not peers and against != "none":
        raise UserError(f"--against {against}: requests of mixed lengths are measured against transformers (or none)")
    length = longest_prompt + longest_output
    found = find_shape(shape, smoke=settings.smoke).at_length(length)
    device = default_device()
    name = record_name(
        "requests", found.name, precision, "" if compile else "eager",
        device=device, R=(rows, ROWS), P=(longest_prompt, PROMPT), N=(longest_output, NEW),
    )  # fmt: skip
    record = Record(
        settings.options(name),
        what=f"{requests} requests of mixed length, {found.name}, {rows} rows at a time, {precision}",
        seeds=[0],
        peers=distributions(["ours", *peers]),
    )
    asked = mixed(found.vocab_size, requests, longest_prompt, longest_output)
    names = ["ours", *peers]
    model = found.build()
    click.echo("comparing texts in fp32", err=True)
    texts: dict[str, list[list[int]]] = {}
    for name in names:
        one = contender(name)(model, device)
        one.prepare_decoding("fp32", compile=False, batch=rows, length=length)
        texts[name] = answer(one, asked[: 2 * rows], rows)
        if difference := first_difference(texts[name], texts["ours"]):
            raise CheckFailed(
                f"{name} does not write what ours does: request {difference[0]}, new token {difference[1]} is"
                f" {difference[2]} there and {difference[3]} here (fp32, greedy); nothing was timed"
            )
        one.close()
    ours = Ours(model, device)
    ways = {"ours": ours} | {name: contender(name)(model, device) for name in peers}
    for one in ways.values():
        one.prepare_decoding(precision, compile=compile, batch=rows, length=length)
    if compile:
        counts = sorted({min(rows, ours.model.rows_of_step(running)) for running in range(1, rows + 1)})
        same_logits(ours, "ours", precision, counts, 1, max(len(text) + n for text, n in asked))
    timed = interleave(
        {name: _answers(one, asked, rows) for name, one in ways.items()},
        rounds,
        synchronize=synchronizer(device),
        progress=turns(rounds),
    )
    useful = sum(n for _, n in asked)
    speeds = {name: timed.rates(name, useful) for name in names}
    for name, values in speeds.items():
        record.measure(f"{name}: useful tokens", values, "tokens/s")
    if peers:
        best = timed.best(peers)
        record.measure(
            "ours against transformers' batched generate at its best",
            timed.times_faster("ours", best),
            "times its speed",
            at_least=None if settings.smoke else TARGET_RATIO,
            peer=(best, statistics.median(speeds[best])),
            better="higher",
        )
    record.measure("decoded for nothing in batches", 1 - useful / wasted(asked, rows), "of all tokens")
    finish(
        record,
        settings,
        bars(f"{requests} requests of mixed length", "useful tokens/s", {n: spread(v) for n, v in speeds.items()}),
        sizes={"shape": found.name, "model": found.model.as_dict(), "vocabulary": found.vocab_size, "rows": rows,
               "requests": [[len(prompt), n] for prompt, n in asked]},
        runs=[{"contender": name, "seconds": seconds} for name, seconds in timed.seconds.items()],
    )  # fmt: skip


def mixed(vocab_size: int, count: int, longest_prompt: int, longest_output: int) -> list[Request]:
    """Requests whose lengths are log-uniform between 1/16 of the longest and the longest."""
    generator = torch.Generator().manual_seed(2)

    def length(longest: int) -> int:
        share = float(torch.rand((), generator=generator))
        return max(1, round(longest * math.exp((share - 1) * math.log(16))))

    found: list[Request] = []
    for _ in range(count):
        prompt = torch.randint(vocab_size, (length(longest_prompt),), generator=generator)
        found.append((prompt.tolist(), length(longest_output)))
    return found


def batches(asked: Sequence[Request], rows: int) -> list[Sequence[Request]]:
    """The requests in order, `rows` at a time."""
    return [asked[i : i + rows] for i in range(0, len(asked), rows)]


def wasted(asked: Sequence[Request], rows: int) -> int:
    """Tokens that are decoded when every row of a batch goes on until its longest is done."""
    return sum(len(part) * max(n for _, n in part) for part in batches(asked, rows))


def answer(one: Contender, asked: Sequence[Request], rows: int) -> list[list[int]]:
    """What follows each prompt, as many tokens as were asked for."""
    if isinstance(one, Ours):
        return one.serve(asked, rows)
    found: list[list[int]] = []
    for part in batches(asked, rows):
        texts = one.generate([prompt for prompt, _ in part], max(n for _, n in part))
        found += [text[:n] for text, (_, n) in zip(texts, part, strict=True)]
    return found


def _answers(one: Contender, asked: Sequence[Request], rows: int) -> Callable[[], Any]:
    return lambda: answer(one, asked, rows)
