"""Training, beside the peers: tokens per second, FLOP/s, share of the machine's matrix product.

Every contender has the same weights, the same batch and the same optimizer in one process; a round is one training
step of each in turn. Before anything is timed the losses must agree

    in fp32, uncompiled           within 1e-5 of each other, relative: another order of sums in fp32 rounds by about
                                  1e-7 a product, averaged over the batch; a wrong weight or position shows at 1e-3
    in the precision timed        within 1e-4 (fp32) or 1e-2 (bf16, whose products round by up to 2^-9 = 0.2 % each)
    after the warm-up steps       within 1e-3 (fp32) or 3e-2 (bf16): Adam's first steps are g / |g|, so where a gradient
                                  is next to nothing its rounding decides the sign of a whole step

The FLOPs are those of `model.flops_per_token` for all. A ceiling is the best of what is measured before and after.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import click
import torch

from sky_core.bench.ceilings import Ceilings, default_device
from sky_core.bench.contenders import contender, distributions, peers_of
from sky_core.bench.contenders.base import Contender
from sky_core.bench.defaults import BATCH, record_name
from sky_core.bench.record import Record, spread
from sky_core.bench.report import Settings, bars, finish, turns
from sky_core.bench.shape import Shape, find_shape
from sky_core.bench.timing import interleave
from sky_core.errors import CheckFailed
from sky_core.training.flops import synchronizer

WEIGHTS = 1e-5
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
AFTER_STEPS = {"fp32": 1e-3, "bf16": 3e-2}

TARGET_RATIO = 1.25
"""Of the issue on speed: against the best of the peers, each compiled, bf16."""


def run(
    settings: Settings,
    *,
    shape: str | None,
    length: int,
    batch: int,
    against: str,
    precision: str,
    compile: bool,
    rounds: int,
    warmup: int,
) -> None:
    """Measure and record. Raises `CheckFailed` when the contenders do not compute the same."""
    if settings.smoke:
        length, batch, rounds, warmup = 16, 2, 2, 1
    peers = peers_of(against)
    names = ["ours", *peers]
    found = find_shape(shape, smoke=settings.smoke).at_length(length)
    how = f"{precision}, {'compiled' if compile else 'uncompiled'}"
    device = default_device()
    name = record_name(
        "train", found.name, f"T{length}", precision, "" if compile else "eager",
        device=device, B=(batch, BATCH),
    )  # fmt: skip
    record = Record(
        settings.options(name),
        what=f"training {found.name}, {batch} x {length} tokens a step, {how}",
        seeds=[0],
        peers=distributions(names),
    )
    ceilings = Ceilings(device, tuple({"fp32": None, precision: None}), small=settings.smoke).update()

    contenders, flops = build(found, names, device, length)
    tokens_BT, targets_BT = random_batch(found.vocab_size, batch, length, device)
    agreement = {"weights, fp32": agree(contenders, tokens_BT, targets_BT, WEIGHTS, "with the same weights in fp32")}
    for one in contenders.values():
        one.prepare_training(precision, compile=compile)
    where = f"before training in {precision}"
    agreement[where] = agree(contenders, tokens_BT, targets_BT, TOLERANCE[precision], where)
    for step in range(warmup):
        for name, one in contenders.items():
            click.echo(f"warm-up {step + 1}/{warmup} {name}", err=True)
            one.train_step(tokens_BT, targets_BT)
    where = f"after {warmup} steps in {precision}"
    agreement[where] = agree(contenders, tokens_BT, targets_BT, AFTER_STEPS[precision], where)

    timed = interleave(
        {name: _step(one, tokens_BT, targets_BT) for name, one in contenders.items()},
        rounds,
        warmup=0,
        synchronize=synchronizer(device),
        progress=turns(rounds),
    )
    ceilings.update()

    ceiling = ceilings.flops[precision]
    tokens = batch * length
    speeds = {name: timed.rates(name, tokens) for name in names}
    best = timed.best(peers) if peers else None
    for name in names:
        record.measure(f"{name}: speed", speeds[name], "tokens/s")
    if best is not None:
        record.measure(
            "ours against the best peer",
            timed.times_faster("ours", best),
            "times its speed",
            at_least=TARGET_RATIO if precision == "bf16" and compile and not settings.smoke else None,
            peer=(best, statistics.median(speeds[best])),
            better="higher",
        )
    for peer in peers:
        record.measure(f"ours against {peer}", timed.times_faster("ours", peer), "times its speed", better="higher")
    for name in names:
        rates = [speed * flops for speed in speeds[name]]
        record.measure(f"{name}: arithmetic", [rate / 1e9 for rate in rates], "GFLOP/s")
        better: Any = "higher" if name == "ours" else None
        record.measure(
            f"{name}: share of the matrix product", [rate / ceiling for rate in rates], "of its FLOP/s", better=better
        )
    for kind, rate in ceilings.flops.items():
        record.measure(f"ceiling: matrix product, {kind}", rate / 1e9, "GFLOP/s")
    finish(
        record,
        settings,
        bars(record_title(found, how), "tokens/s", {name: spread(speeds[name]) for name in names}),
        sizes={"shape": found.name, "model": found.model.as_dict(), "vocabulary": found.vocab_size, "length": length,
               "batch": batch, "flops_per_token": flops},
        parameters={name: one.parameters for name, one in contenders.items()},
        losses=agreement,
        ceilings=ceilings.as_dict(),
        runs=[{"contender": name, "seconds": seconds} for name, seconds in timed.seconds.items()],
    )  # fmt: skip


def record_title(shape: Shape, how: str) -> str:
    return f"training {shape.name} ({how})"


def build(shape: Shape, names: list[str], device: str, length: int) -> tuple[dict[str, Contender], float]:
    """The contenders with one set of weights, and the training FLOPs of a token."""
    model = shape.build()
    flops = model.flops_per_token(length)
    return {name: contender(name)(model, device) for name in names}, flops


def random_batch(vocab_size: int, batch: int, length: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and, one to the right, their targets."""
    generator = torch.Generator().manual_seed(0)
    row_BL = torch.randint(vocab_size, (batch, length + 1), generator=generator).to(device)
    return row_BL[:, :-1].contiguous(), row_BL[:, 1:].contiguous()


def agree(
    contenders: dict[str, Contender], tokens_BT: torch.Tensor, targets_BT: torch.Tensor, tolerance: float, when: str
) -> dict[str, float]:
    """The losses of all. Raises `CheckFailed` naming the first that differs from ours by more than `tolerance`."""
    losses = {name: one.loss(tokens_BT, targets_BT) for name, one in contenders.items()}
    if difference := disagreement(losses, tolerance):
        raise CheckFailed(f"{difference} {when} (tolerance {tolerance:.0e}); nothing was timed")
    return losses


def disagreement(losses: dict[str, float], tolerance: float) -> str | None:
    """Who differs from ours by more than `tolerance`, relative, and by what; None when nobody does."""
    ours = losses["ours"]
    for name, loss in losses.items():
        if not abs(loss - ours) <= tolerance * abs(ours):
            return f"{name} does not compute what ours does: loss {loss:.6f} against {ours:.6f}"
    return None


def _step(one: Contender, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> Callable[[], None]:
    return lambda: one.train_step(tokens_BT, targets_BT)
