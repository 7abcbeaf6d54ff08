"""Tokens per second of the ways to read training batches, the file in the page cache, in turn in one process.

    token files   TokenFiles.batch: keyed permutation, memory map, one gather for inputs and targets
    tar shards    the same from webdataset tar shards, by offset
    nanoGPT       get_batch of its train.py (MIT licence): the memory map opened anew for every batch, random windows,
                  inputs and targets sliced one by one and stacked

Bytes are the tokens (uint16 on disk). Batches of `--batch` sequences of `--length` tokens come out, int64 on the CPU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from record import Record, arguments

from sky_core.components.tokenizer import Byte
from sky_core.data.prepare import prepare
from sky_core.data.read import Document
from sky_core.data.tokens import TokenFiles

TARGETS = {"token files": 50e6, "tar shards": 20e6}
"""Of the issue on data at scale; recorded here from the start."""


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


def main() -> None:
    parser = arguments("loading", __doc__)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="tokens in the file (default: 50 million)")
    parser.add_argument("--batch", type=int, default=32, help="sequences per batch (default: 32)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default: 512)")
    parser.add_argument("--rounds", type=int, default=21, help="timings of each way (default: 21)")
    parser.add_argument("--batches", type=int, default=100, help="batches per timing (default: 100)")
    options = parser.parse_args()
    if options.smoke:
        options.tokens, options.batch, options.length, options.rounds, options.batches = 20_000, 4, 16, 2, 3
    record = Record(options, what="tokens read per second, batches of int64 tensors", seeds=[0])

    torch.manual_seed(0)
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, corpus, tokenizer = Path(name), documents(options.tokens), Byte().train(())
        prepare(corpus, folder / "tokens", tokenizer, split="position", format="tokens")
        prepare(corpus, folder / "shards", tokenizer, split="position", format="shards")
        files = TokenFiles(folder / "tokens", options.length)
        shards = TokenFiles(folder / "shards", options.length)
        ways: dict[str, Callable[[int], object]] = {
            "token files": lambda i: files.batch(i * options.batch, options.batch),
            "tar shards": lambda i: shards.batch(i * options.batch, options.batch),
            "nanoGPT": lambda _: nanogpt_get_batch(folder / "tokens" / "train.bin", options.batch, options.length),
        }
        for turn in range(options.rounds + 1):  # the first one warms up
            for way, read in ways.items():
                started = time.perf_counter()
                for i in range(options.batches):
                    read(turn * options.batches + i)
                seconds = time.perf_counter() - started
                if turn:
                    speeds.setdefault(way, []).append(options.batches * options.batch * options.length / seconds)
    theirs = sorted(speeds["nanoGPT"])[options.rounds // 2]
    for way, values in speeds.items():
        if way in TARGETS:
            record.measure(way, values, "tokens/s", at_least=TARGETS[way], peer=("nanoGPT", theirs))
        else:
            record.measure(f"{way}'s get_batch", values, "tokens/s")
    sizes = {key: getattr(options, key) for key in ("tokens", "batch", "length", "batches")}
    record.save(sizes=sizes, runs=speeds)


if __name__ == "__main__":
    main()
