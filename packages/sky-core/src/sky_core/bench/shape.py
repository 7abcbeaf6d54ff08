"""The model that is measured: a preset by name (`sky-50m`), a preset or run file by path, or the smallest that works.

Weights are random and larger than those a training begins with: at the start all models of one vocabulary have nearly
the same loss and greedy decoding repeats itself, so that contenders which compute different things could agree.

V vocabulary, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sky_core.bench.record import repository
from sky_core.components.model import Decoder
from sky_core.config import Preset, parse_preset, read_run_or_preset
from sky_core.errors import UserError

if TYPE_CHECKING:
    from sky_core.model.decoder import DecoderLM
    from sky_core.tokenizer.base import Tokenizer

SMOKE: dict[str, Any] = {
    "model": {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32, "max_length": 64, "qk_norm": "head",
              "feedforward": {"kind": "swiglu", "d_ff": 64}, "vocab_size": 97},
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A decoder as run-file options, and the rows of its embedding."""

    name: str
    model: Decoder
    vocab_size: int

    def build(self, seed: int = 0) -> DecoderLM:
        """The model on the CPU, its matrices drawn from N(0, 1 / columns)."""
        import torch

        torch.manual_seed(seed)
        model = self.model.build(self.vocab_size)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        return model

    def changed(self, **options: Any) -> Shape:
        """The same shape with other options of its model; `vocab_size` is one of them."""
        table = {**self.model.as_dict(), "vocab_size": self.vocab_size, **options}
        preset = parse_preset({"name": "changed", "model": table})
        assert isinstance(preset.model, Decoder)
        return Shape(self.name, preset.model, preset.vocab_size)

    def at_length(self, length: int) -> Shape:
        """The same shape with a context of at least `length`."""
        return self if length <= self.model.max_length else self.changed(max_length=length)


def find_shape(source: str | None, *, smoke: bool = False) -> Shape:
    """The shape called `source`; the smallest one in a smoke run without a name.

    Raises `UserError` when there is none, or when it is no decoder of core.
    """
    if smoke and source is None:
        preset: Any = parse_preset(SMOKE)
        return Shape("smoke", preset.model, preset.vocab_size)
    source = source or "sky-50m"
    path = Path(source)
    if not path.suffix and not path.exists():
        path = _preset(source)
    found = read_run_or_preset(path)
    if not isinstance(found.model, Decoder):
        raise UserError(f"{path}: model.kind is {found.model.kind!r}; the benchmarks measure `decoder`")
    if isinstance(found, Preset):
        return Shape(found.name, found.model, found.vocab_size)
    sizes = (getattr(part, "vocab_size", None) for part in (found.tokenizer, found.model))
    vocab_size = next((size for size in sizes if size is not None), None)
    if vocab_size is None:
        raise UserError(f"{path}: the vocabulary is only known with the data; set model.vocab_size")
    return Shape(found.name, found.model, vocab_size)


def _preset(name: str) -> Path:
    folders = [root / "recipes" / "models" for root in (repository(), Path.cwd()) if root is not None]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise UserError(
        f"--shape {name}: no recipes/models/{name}.yaml in this repository and no such file;"
        " give the path of a model preset or run file"
    )


def id_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer for a model that was never trained: `vocab_size` ids, each with a text of its own, none special."""
    from sky_core.tokenizer.base import PieceTokenizer

    class Ids(PieceTokenizer):
        kind = "ids"

        def __init__(self, size: int) -> None:
            super().__init__([f"{i} ".encode() for i in range(size)], {})

        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

        def as_dict(self) -> dict[str, Any]:
            return {"kind": self.kind, "size": self.vocab_size}

        @classmethod
        def from_dict(cls, definition: dict[str, Any]) -> Ids:
            return cls(definition["size"])

    return Ids(vocab_size)
