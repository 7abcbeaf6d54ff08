"""Tokens per second of the ways to read training batches, the file in the page cache, in turn in one process.

    token files   TokenFiles.batch: keyed permutation, memory map, one gather for inputs and targets
    tar shards    the same from webdataset tar shards, by offset
    nanoGPT       get_batch of its train.py (MIT licence): the memory map opened anew for every batch, random windows,
                  inputs and targets sliced one by one and stacked

Bytes are the tokens (uint16 on disk). Batches of `batch` sequences of `length` tokens come out, int64 on the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sky_core.bench.record import Record, spread
from sky_core.bench.report import Settings, bars, finish
from sky_core.bench.timing import interleave
from sky_core.components.tokenizer import Byte
from sky_core.data.prepare import prepare
from sky_core.data.read import Document
from sky_core.data.tokens import TokenFiles

TARGETS = {"token files": 50e6, "tar shards": 20e6}
"""Of the issues on data at scale and on speed."""

WHAT = "tokens read per second, batches of int64 tensors"


def run(settings: Settings, *, tokens: int, batch: int, length: int, rounds: int, batches: int) -> None:
    """Measure and record."""
    if settings.smoke:
        tokens, batch, length, rounds, batches = 20_000, 4, 16, 2, 3
    record = Record(settings.options("loading"), what=WHAT, seeds=[0])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder, corpus, tokenizer = Path(name), documents(tokens), Byte().train(())
        prepare(corpus, folder / "tokens", tokenizer, split="position", format="tokens")
        prepare(corpus, folder / "shards", tokenizer, split="position", format="shards")
        files = TokenFiles(folder / "tokens", length)
        shards = TokenFiles(folder / "shards", length)
        ways: dict[str, Callable[[int], object]] = {
            "token files": lambda i: files.batch(i * batch, batch),
            "tar shards": lambda i: shards.batch(i * batch, batch),
            "nanoGPT": lambda _: nanogpt_get_batch(folder / "tokens" / "train.bin", batch, length),
        }
        timed = interleave({way: _reader(read, batches) for way, read in ways.items()}, rounds)
    speeds = {way: timed.rates(way, batches * batch * length) for way in ways}
    theirs = spread(speeds["nanoGPT"])["value"]
    for way, values in speeds.items():
        if way in TARGETS:
            record.measure(way, values, "tokens/s", at_least=TARGETS[way], peer=("nanoGPT", theirs))
        else:
            record.measure(f"{way}'s get_batch", values, "tokens/s")
    for way in TARGETS:
        record.measure(f"{way} against nanoGPT", timed.times_faster(way, "nanoGPT"), "times its speed", better="higher")
    sizes = {"tokens": tokens, "batch": batch, "length": length, "batches": batches}
    plot = bars(WHAT, "tokens/s", {way: spread(values) for way, values in speeds.items()})
    finish(record, settings, plot, sizes=sizes, runs=speeds)


def _reader(read: Callable[[int], object], batches: int) -> Callable[[], None]:
    """Reads the next `batches` batches each time it is called."""
    position = 0

    def go() -> None:
        nonlocal position
        for _ in range(batches):
            read(position)
            position += 1

    return go


def documents(tokens: int) -> list[Document]:
    """Random printable characters in documents of 100 thousand."""
    text = np.random.default_rng(0).integers(32, 127, tokens, dtype=np.uint8).tobytes().decode("ascii")
    size = min(100_000, tokens // 10)
    return [Document(str(at), text[at : at + size], "random") for at in range(0, tokens, size)]


def nanogpt_get_batch(file: Path, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = np.memmap(file, dtype=np.uint16, mode="r")
    ix = torch.randint(len(data) - length, (batch,))
    x = torch.stack([torch.from_numpy((data[i : i + length]).astype(np.int64)) for i in ix])
    y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + length]).astype(np.int64)) for i in ix])
    return x, y
