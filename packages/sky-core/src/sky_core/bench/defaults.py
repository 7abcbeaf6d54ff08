"""The sizes that benchmarks have unless told otherwise, and what a record is called that has others.

Records of different sizes, or of another device than the CPU, must not overwrite each other.
"""

from __future__ import annotations

from collections.abc import Sequence

Size = float | str | Sequence[float] | Sequence[str]

LENGTH, BATCH = 512, 4
"""Of a training step: tokens of a sequence, sequences."""
STEP_TOKENS = 16_384
"""Tokens of the step that an optimizer's share is of."""
BATCHES, PROMPT, NEW, ROWS = (1, 8), 16, 64, 8
"""Of decoding: rows, tokens of a prompt, tokens behind it; requests that are decoded at a time."""
FILE_TOKENS, FILE_BATCH = 50_000_000, 32
"""Of loading: tokens in the file, sequences of a batch."""
AXES = ("length", "width", "depth", "batch", "vocabulary")
FACTORS = (0.25, 0.5, 1.0, 2.0)
"""Of scaling: what is varied, and times which size."""


def joined(values: Size, by: str = ",") -> str:
    """A size as text: `512`, `1,8`."""
    if isinstance(values, str):
        return values
    several = values if isinstance(values, Sequence) else [values]
    return by.join(
        one if isinstance(one, str) else f"{one:g}" if isinstance(one, float) else str(one) for one in several
    )


def record_name(*words: str, device: str, **sizes: tuple[Size, Size]) -> str:
    """The words that are not empty, then each size (letter = value, default) that is not the default, then the device.

    record_name("train", "sky-50m", "bf16", device="cpu", B=(8, 4))  is  train-sky-50m-bf16-B8
    """
    others = {letter: (joined(value, "-"), joined(default, "-")) for letter, (value, default) in sizes.items()}
    found = [
        *filter(None, words),
        *(f"{letter}{value}" for letter, (value, default) in others.items() if value != default),
    ]
    return "-".join(found if device == "cpu" else [*found, device])
