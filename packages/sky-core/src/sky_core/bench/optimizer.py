"""Milliseconds of an optimizer step at a shape, and its share of a training step of so many tokens.

    AdamW written out    `sky_core.training.adamw.AdamW`, as the equations stand
    AdamW fused          torch's one-pass kernel, what `optimizer: adamw` takes
    AdamW of torch       torch.optim.AdamW as it comes (foreach)
    Muon, newton_schulz  ours on hidden matrices, fused AdamW on the rest; so `polar_express`
    Muon of torch        torch.optim.Muon on the same matrices, fused AdamW on the rest

Each holds its own copy of the parameters; gradients are random. The rest of a training step (forward and backward of
our model as it is trained: its layers compiled, bf16 where the machine multiplies it) is timed on one micro-batch of
`batch` x `length` tokens in the same rounds and counted as often as the step of `batch_tokens` has micro-batches:

    share = optimizer / (optimizer + batch_tokens / (batch length) * micro-batch)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sky_core.bench.ceilings import default_device
from sky_core.bench.contenders.ours import Ours
from sky_core.bench.defaults import BATCH, LENGTH, STEP_TOKENS, record_name
from sky_core.bench.record import Record, spread
from sky_core.bench.report import Settings, bars, finish, turns
from sky_core.bench.shape import find_shape
from sky_core.bench.timing import interleave
from sky_core.bench.train import random_batch
from sky_core.components.optimization import AdamW, Muon
from sky_core.training.flops import synchronizer
from sky_core.training.groups import Named
from sky_core.training.muon import split
from sky_core.training.precision import resolve_precision

TARGET_SHARE = 0.15
"""Of the issue on speed: Muon at sky-50m with 16k tokens a step."""

Optimizers = list[torch.optim.Optimizer]


def run(
    settings: Settings, *, shape: str | None, batch_tokens: int, length: int, batch: int, compile: bool, rounds: int
) -> None:
    """Measure and record."""
    if settings.smoke:
        length, batch, batch_tokens, rounds = 16, 2, 128, 2
    found = find_shape(shape, smoke=settings.smoke).at_length(length)
    device = default_device()
    name = record_name(
        "optimizer", found.name, "" if compile else "eager",
        device=device, S=(batch_tokens, STEP_TOKENS), T=(length, LENGTH), B=(batch, BATCH),
    )  # fmt: skip
    record = Record(
        settings.options(name),
        what=f"an optimizer step of {found.name}, of a training step of {batch_tokens:,} tokens"
        f"{', compiled' if compile else ''}",
        seeds=[0],
    )
    ours = Ours(found.build(), device)
    precision = resolve_precision("auto", device)
    ours.prepare_training(precision, compile=compile)
    tokens_BT, targets_BT = random_batch(found.vocab_size, batch, length, device)

    def forward_backward() -> None:
        ours.accumulate(tokens_BT, targets_BT)
        ours.model.zero_grad(set_to_none=True)

    named = [(name, parameter) for name, parameter in ours.model.named_parameters() if parameter.requires_grad]
    built = {name: build(_copies(named)) for name, build in CHOICES.items()}
    work: dict[str, Callable[[], object]] = {name: _step(optimizers) for name, optimizers in built.items()}
    work["micro-batch"] = forward_backward
    timed = interleave(
        work,
        rounds,
        warmup=2 if compile else 1,
        synchronize=synchronizer(device),
        progress=turns(rounds),
    )
    micro = batch_tokens / (batch * length)
    milliseconds = {name: [1e3 * seconds for seconds in timed.seconds[name]] for name in CHOICES}
    for name in CHOICES:
        record.measure(name, milliseconds[name], "ms")
    for name in CHOICES:
        pairs = zip(timed.seconds[name], timed.seconds["micro-batch"], strict=True)
        record.measure(
            f"{name}: share of a training step",
            [own / (own + micro * rest) for own, rest in pairs],
            "of its time",
            at_most=TARGET_SHARE if name.startswith("Muon, ") and not settings.smoke else None,
            better="lower",
        )
    if "Muon of torch" in CHOICES:
        record.measure(
            "our Muon against torch's",
            timed.times_faster("Muon, newton_schulz", "Muon of torch"),
            "times its speed",
            better="higher",
        )
    rest = [1e3 * seconds for seconds in timed.seconds["micro-batch"]]
    record.measure(f"forward and backward of {batch} x {length} tokens, {precision}", rest, "ms")
    finish(
        record,
        settings,
        bars(f"an optimizer step of {found.name}", "ms", {name: spread(v) for name, v in milliseconds.items()}),
        sizes={"shape": found.name, "model": found.model.as_dict(), "vocabulary": found.vocab_size, "length": length,
               "batch": batch, "batch_tokens": batch_tokens, "precision": precision, "compile": compile},
        runs=[{"what": name, "seconds": seconds} for name, seconds in timed.seconds.items()],
    )  # fmt: skip


def _copies(named: list[Named]) -> list[Named]:
    """Parameters of the same names and values with random gradients."""
    generator = torch.Generator().manual_seed(0)
    copies = []
    for name, parameter in named:
        copy = nn.Parameter(parameter.detach().clone())
        copy.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        copies.append((name, copy))
    return copies


def _step(optimizers: Optimizers) -> Callable[[], None]:
    def go() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return go


def _torch_muon(named: list[Named]) -> Optimizers:
    hidden, others = split(named)
    muon: Any = torch.optim.Muon([parameter for _, parameter in hidden], lr=0.02)
    return [muon, *AdamW().build(others)]


CHOICES: dict[str, Callable[[list[Named]], Optimizers]] = {
    "AdamW written out": lambda named: AdamW(fused=False).build(named),
    "AdamW fused": lambda named: AdamW(fused=True).build(named),
    "AdamW of torch": lambda named: [torch.optim.AdamW([parameter for _, parameter in named])],
    "Muon, newton_schulz": lambda named: Muon(iteration="newton_schulz").build(named),
    "Muon, polar_express": lambda named: Muon(iteration="polar_express").build(named),
}
if hasattr(torch.optim, "Muon"):  # torch 2.9 and later
    CHOICES["Muon of torch"] = _torch_muon
