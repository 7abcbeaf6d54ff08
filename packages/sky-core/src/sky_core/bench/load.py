"""Tokens per second of the ways to read training batches, the file in the page cache, in turn in one process.

    token files   what the trainer calls: a `Loader` over `TokenFiles`, which reads ahead in a thread, in shuffled order
                  without repetition, and goes on exactly where it stopped; opened anew for each timing, at the place
                  that the last one reached, and what it has read too far when it closes is lost time
    tar shards    the same from webdataset tar shards, by offset
    nanoGPT       get_batch of its train.py (MIT licence): the memory map opened anew for every batch, random windows,
                  inputs and targets sliced one by one and stacked

and the first two with documents told apart (`mask`: four tensors a batch, not two), packed (`best_fit`), and mixed.
Bytes are the tokens (uint16 on disk), in documents whose lengths are log-normal with a median of 500. Batches of
`batch` sequences of `length` tokens come out, int64 on the CPU. Nothing is timed before shards have given the sequences
of token files, and a loader that went on those of one that never stopped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sky_core.bench.defaults import FILE_BATCH, FILE_TOKENS, LENGTH, record_name
from sky_core.bench.record import Record, spread
from sky_core.bench.report import Settings, bars, finish
from sky_core.bench.timing import interleave
from sky_core.components.tokenizer import Byte
from sky_core.data.dataset import Dataset
from sky_core.data.loader import Loader
from sky_core.data.mixture import Mixture
from sky_core.data.prepare import prepare
from sky_core.data.read import Document
from sky_core.data.tokens import TokenFiles
from sky_core.errors import CheckFailed

TARGETS = {"token files": 50e6, "tar shards": 20e6}
"""Of the issues on data at scale and on speed."""

OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    ", documents: mask": {"documents": "mask"},
    ", packing: best_fit": {"packing": "best_fit"},
    ", packing: best_fit, documents: mask": {"packing": "best_fit", "documents": "mask"},
}

WHAT = "tokens read per second, batches of int64 tensors"


def run(settings: Settings, *, tokens: int, batch: int, length: int, rounds: int, batches: int) -> None:
    """Measure and record. Raises `CheckFailed` when two ways do not give the same sequences."""
    if settings.smoke:
        tokens, batch, length, rounds, batches = 20_000, 4, 16, 2, 3
    sizes = {"M": (tokens, FILE_TOKENS), "B": (batch, FILE_BATCH), "T": (length, LENGTH)}
    record = Record(settings.options(record_name("loading", device="cpu", **sizes)), what=WHAT, seeds=[0])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder, corpus, tokenizer = Path(name), documents(tokens), Byte().train(())
        prepare(corpus, folder / "tokens", tokenizer, split="position", format="tokens")
        prepare(corpus, folder / "shards", tokenizer, split="position", format="shards")
        datasets = open_all(folder / "tokens", folder / "shards", length)
        check(datasets, batch)
        ways = {way: _reader(dataset, batch, batches) for way, dataset in datasets.items()}
        ways["nanoGPT"] = lambda: _repeat(batches, nanogpt_get_batch, folder / "tokens" / "train.bin", batch, length)
        timed = interleave(ways, rounds)
    speeds = {way: timed.rates(way, batches * batch * length) for way in ways}
    theirs = spread(speeds["nanoGPT"])["value"]
    for way, values in speeds.items():
        if way in TARGETS:
            record.measure(way, values, "tokens/s", at_least=TARGETS[way], peer=("nanoGPT", theirs))
        else:
            record.measure("nanoGPT's get_batch" if way == "nanoGPT" else way, values, "tokens/s")
    for way in TARGETS:
        record.measure(f"{way} against nanoGPT", timed.times_faster(way, "nanoGPT"), "times its speed", better="higher")
    details = {"tokens": tokens, "documents": len(corpus), "batch": batch, "length": length, "batches": batches}
    plot = bars(WHAT, "tokens/s", {way: spread(values) for way, values in speeds.items()})
    finish(record, settings, plot, sizes=details, runs=speeds)


def open_all(tokens: Path, shards: Path, length: int) -> dict[str, Dataset]:
    """The ways to read the two prepared folders, by name."""
    found: dict[str, Dataset] = {}
    for name, folder in (("token files", tokens), ("tar shards", shards)):
        plain = TokenFiles(folder, length)
        found |= {name + words: TokenFiles(folder, length, **given) for words, given in OPTIONS.items()}
        found[f"{name}, two mixed 7:3"] = Mixture([(7, plain), (3, TokenFiles(folder, length, seed=1))])
    return found


def check(datasets: dict[str, Dataset], batch: int) -> None:
    """Hold shards to token files, and loaders that go on to those that never stopped."""
    for way, dataset in datasets.items():
        same = datasets[way.replace("tar shards", "token files")].batch(0, 4 * batch)
        read, position = [], 0
        for _ in range(2):
            with Loader(dataset, position, batch) as loader:
                read += [next(loader), next(loader)]
                position = loader.position
        for tensor in ("tokens_BT", "targets_BT", "documents_BT", "positions_BT"):
            ours = [getattr(one, tensor) for one in read]
            if ours[0] is not None and not torch.equal(torch.cat(ours), getattr(same, tensor)):
                raise CheckFailed(f"{way}: its {tensor} are not those of token files read at once; nothing was timed")


def _reader(dataset: Dataset, batch: int, batches: int) -> Callable[[], None]:
    """Reads the next `batches` batches as the trainer does each time it is called."""
    position = 0

    def go() -> None:
        nonlocal position
        with Loader(dataset, position, batch) as loader:
            _repeat(batches, next, loader)
            position = loader.position

    return go


def _repeat(times: int, function: Callable[..., object], *given: object) -> None:
    for _ in range(times):
        function(*given)


def documents(tokens: int) -> list[Document]:
    """Random printable characters in documents of mixed length."""
    random = np.random.default_rng(0)
    text = random.integers(32, 127, tokens, dtype=np.uint8).tobytes().decode("ascii")
    ends = np.cumsum(1 + random.lognormal(np.log(500), 1.2, tokens // 200 + 1).astype(np.int64))
    borders = [0, *ends[ends < tokens].tolist(), tokens]
    return [Document(str(start), text[start:end], "random") for start, end in pairwise(borders)]


def nanogpt_get_batch(file: Path, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = np.memmap(file, dtype=np.uint16, mode="r")
    ix = torch.randint(len(data) - length, (batch,))
    x = torch.stack([torch.from_numpy((data[i : i + length]).astype(np.int64)) for i in ix])
    y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + length]).astype(np.int64)) for i in ix])
    return x, y
