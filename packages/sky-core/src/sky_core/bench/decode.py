"""Decoding, beside the peers: tokens per second, and the share of what the memory allows.

A round is, for each contender in turn, `batch` prompts of equal length continued greedily by `new` tokens; reading the
prompts is part of its time. A pass of decoding reads every weight once and the keys and values of every row, so

    limit = batch · bandwidth / (bytes of the weights in their format + batch · bytes of keys and values at mid-text)

with the bandwidth measured here (`ceilings.py`). Weights of a quantised format are counted as they lie in memory.

Before anything is timed all contenders decode the same prompts in fp32: their texts must be equal, token by token
(random weights of that size leave no near ties, so another order of sums cannot show); the first difference is
reported. What is timed is another computation, compiled and in other formats: the logits of our compiled steps must be
those of our uncompiled ones in each format, up to `COMPILED`. transformers takes part with its growing and with its
static cache; its best counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
import torch

from sky_core.bench.ceilings import Ceilings, default_device
from sky_core.bench.contenders import contender, distributions, peers_of
from sky_core.bench.contenders.base import Contender, Prompts
from sky_core.bench.contenders.ours import Ours
from sky_core.bench.defaults import BATCHES, NEW, PROMPT, record_name
from sky_core.bench.record import Record, spread
from sky_core.bench.report import Settings, bars, finish, turns
from sky_core.bench.shape import Shape, find_shape
from sky_core.bench.timing import interleave
from sky_core.errors import CheckFailed, UserError
from sky_core.model.count import kv_bytes_per_token
from sky_core.quantization import FORMATS
from sky_core.training.flops import synchronizer

CHECKED = 24
"""Tokens of each text that are compared."""

TARGETS = {1: 3.0, 8: 2.5}
"""Of the issue on speed: batch -> times the speed of transformers at its best."""

SHARE = 0.6
"""Of the issue on speed: of the memory's limit at batch 1."""

OVER_BF16 = {"int8": 1.5, "int4": 2.5}
"""Of the issue on speed: times the speed of our bf16 at batch 1."""

COMPILED = {"fp32": 1e-4, "bf16": 5e-2}
"""How far apart logits of compiled and uncompiled steps may be (root mean square, relative). In fp32 only the order of
sums differs, about 1e-7 each. In bf16, in which quantised weights are used as well, uncompiled steps round what leaves
each operation by up to 2^-9 and compiled ones what leaves a fused loop: 1.5e-2 in all at sky-50m. Weights, masks or
positions that are not ours give errors of the size of the logits, 1."""

NUMBER_BYTES = {"fp32": 4}
"""Bytes of a number in the cache, 2 in every other format."""


def run(
    settings: Settings,
    *,
    shape: str | None,
    batches: Sequence[int],
    prompt: int,
    new: int,
    against: str,
    precision: str,
    formats: Sequence[str],
    compile: bool,
    rounds: int,
) -> None:
    """Measure and record. Raises `CheckFailed` when the contenders do not write the same."""
    if settings.smoke:
        prompt, new, rounds, batches = 4, 6, 1, list(batches)[:2]
    if unknown := [one for one in formats if one not in FORMATS]:
        raise UserError(f"--quantize {unknown[0]}: no such format; use {', '.join(FORMATS)}")
    peers = with_static(peers_of(against))
    found = find_shape(shape, smoke=settings.smoke).at_length(prompt + new)
    own = {f"ours, {one}": one for one in dict.fromkeys([precision, *formats])}
    device = default_device()
    name = record_name(
        "decode", found.name, precision, "" if compile else "eager",
        device=device, B=(batches, BATCHES), P=(prompt, PROMPT), N=(new, NEW),
    )  # fmt: skip
    record = Record(
        settings.options(name),
        what=f"decoding {found.name}: {new} tokens after {prompt}, {precision}{', compiled' if compile else ''}",
        seeds=[0],
        peers=distributions(["ours", *peers]),
    )
    ceilings = Ceilings(device, (), small=settings.smoke).update()
    click.echo("comparing texts in fp32", err=True)
    same_texts(
        found, ["ours", *peers], device, random_prompts(found.vocab_size, max(batches), prompt), min(new, CHECKED)
    )

    model = found.build()
    ours = {name: Ours(model, device) for name in own}
    theirs = {name: contender(name)(model, device) for name in peers}
    ways: dict[str, Contender] = {**ours, **theirs}
    del model
    for name, our in ours.items():
        our.prepare_decoding(own[name], compile=compile, batch=max(batches), length=prompt + new)
    if compile:
        for name, our in ours.items():
            same_logits(our, name, own[name], batches, prompt, prompt + new)
    runs: list[dict[str, Any]] = []
    plots: dict[str, dict[str, Any]] = {}
    weights: dict[str, int] = {}
    for index, batch in enumerate(batches):
        prompts = random_prompts(found.vocab_size, batch, prompt)
        for one in theirs.values():
            one.prepare_decoding(precision, compile=compile, batch=batch, length=prompt + new)
        weights |= {name: one.decoded_bytes() for name, one in ways.items()}
        timed = interleave(
            {name: _generation(one, prompts, new) for name, one in ways.items()},
            rounds,
            warmup=2 if compile and index == 0 else 1,
            synchronize=synchronizer(device),
            progress=turns(rounds, f"batch {batch} "),
        )
        ceilings.update()
        speeds = {name: timed.rates(name, batch * new) for name in ways}
        runs += [{"batch": batch, "contender": name, "seconds": timed.seconds[name]} for name in ways]
        plots |= {f"{name}, batch {batch}": spread(values) for name, values in speeds.items()}
        _measure(record, timed, speeds, list(own), peers, batch, smoke=settings.smoke)
        for name in ways:
            middle = prompt + new // 2
            cached = batch * middle * cache_bytes(found, own.get(name, precision))
            limit = batch * ceilings.bandwidth / (weights[name] + cached)
            record.measure(
                f"batch {batch}, {name}: share of the memory's limit",
                [speed / limit for speed in speeds[name]],
                "of its tokens/s",
                at_least=SHARE if name in own and batch == 1 and not settings.smoke else None,
                better="higher" if name in own else None,
            )
    record.measure("ceiling: memory, copy", ceilings.copy_bytes / 1e9, "GB/s")
    record.measure("ceiling: memory, read", ceilings.read_bytes / 1e9, "GB/s")
    finish(
        record,
        settings,
        bars(f"decoding {found.name}", "tokens/s", plots),
        sizes={"shape": found.name, "model": found.model.as_dict(), "vocabulary": found.vocab_size, "prompt": prompt,
               "new": new, "batches": list(batches), "weight_bytes": weights},
        ceilings=ceilings.as_dict(),
        runs=runs,
    )  # fmt: skip


def _measure(
    record: Record,
    timed: Any,
    speeds: dict[str, list[float]],
    own: list[str],
    peers: list[str],
    batch: int,
    *,
    smoke: bool,
) -> None:
    """Speeds at one batch size, ours against the best of each peer, our formats against the first of them."""
    for name, values in speeds.items():
        record.measure(f"batch {batch}, {name}: speed", values, "tokens/s")
    first = own[0]
    for library in ("transformers", "litgpt"):
        forms = [name for name in peers if name.split("-")[0] == library]
        if forms:
            best = timed.best(forms)
            record.measure(
                f"batch {batch}, {first} against {library} at its best",
                timed.times_faster(first, best),
                "times its speed",
                at_least=TARGETS.get(batch) if library == "transformers" and not smoke else None,
                peer=(best, statistics.median(speeds[best])),
                better="higher",
            )
    for name in own[1:]:
        target = OVER_BF16.get(name.removeprefix("ours, ")) if first.endswith("bf16") and batch == 1 else None
        record.measure(
            f"batch {batch}, {name} against {first.removeprefix('ours, ')}",
            timed.times_faster(name, first),
            "times its speed",
            at_least=None if smoke else target,
            better="higher",
        )


def with_static(peers: list[str]) -> list[str]:
    """The peers, transformers with both of its caches."""
    return [form for name in peers for form in ((name, f"{name}-static") if name == "transformers" else (name,))]


def cache_bytes(shape: Shape, precision: str) -> int:
    """Bytes of keys and values of one token; they are bf16 beside quantised weights."""
    model = shape.model
    heads = model.n_kv_head or model.n_head
    return kv_bytes_per_token(model.n_layer, heads, model.width_of_head, NUMBER_BYTES.get(precision, 2))


def random_prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    prompts: list[list[int]] = torch.randint(vocab_size, (count, length), generator=generator).tolist()
    return prompts


def same_texts(shape: Shape, names: Sequence[str], device: str, prompts: Prompts, n: int) -> None:
    """Raise `CheckFailed` with the first token at which a contender's greedy text in fp32 is not ours."""
    model = shape.build()
    ours: list[list[int]] = []
    for name in names:
        one = contender(name)(model, device)
        length = max(map(len, prompts)) + n
        one.prepare_decoding("fp32", compile=False, batch=len(prompts), length=length)
        texts = one.generate(prompts, n)
        one.close()
        if name == "ours":
            ours = texts
        elif difference := first_difference(texts, ours):
            row, place, theirs, own = difference
            raise CheckFailed(
                f"{name} does not write what ours does: prompt {row}, new token {place} is {theirs} there and {own}"
                " here (fp32, greedy, equal weights); nothing was timed"
            )


def same_logits(one: Ours, name: str, form: str, rows: Iterable[int], prompt: int, length: int) -> None:
    """Raise `CheckFailed` where compiled steps of so many rows compute something else than uncompiled ones, with the
    weights in the same `form`. The graphs that are made for this are those that are timed."""
    for count in rows:
        click.echo(f"comparing compiled with uncompiled steps of {name}, {count} rows", err=True)
        error = one.error_of_compiled_steps(count, prompt, length)
        if not error <= (tolerance := COMPILED.get(form, COMPILED["bf16"])):
            raise CheckFailed(
                f"{name}: compiled steps of {count} rows do not compute what uncompiled ones do: their logits are"
                f" {error:.1e} apart, relative (tolerance {tolerance:.0e}); nothing was timed"
            )


def first_difference(
    texts: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]
) -> tuple[int, int, int | None, int | None] | None:
    """(row, place, their token, our token) where texts part, None where they do not; a missing token is None."""
    for row, (theirs, own) in enumerate(zip(texts, ours, strict=True)):
        for place in range(max(len(theirs), len(own))):
            pair = [text[place] if place < len(text) else None for text in (theirs, own)]
            if pair[0] != pair[1]:
                return row, place, pair[0], pair[1]
    return None


def _generation(one: Contender, prompts: Prompts, n: int) -> Callable[[], object]:
    return lambda: one.generate(prompts, n)
