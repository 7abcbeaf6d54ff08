"""safetensors files of a checkpoint: one file, or shards with an index. Never a pickle.

    model.safetensors
    model-00001-of-00003.safetensors ... + model.safetensors.index.json {"metadata": ..., "weight_map": {name: file}}

Tensors are read one at a time out of a memory map, and written one shard at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sky_core.errors import CheckpointError, UserError
from sky_core.files import write_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (b"PK\x03\x04", b"\x80")
"""What files of torch.save begin with, now and before."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Those that fp32 holds exactly."""


class TensorFiles:
    """The tensors of a checkpoint folder, by name. Raises `UserError` or `CheckpointError` when there are none to read.

    `shapes` maps names to shapes, `dtypes` to those of torch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._open: dict[str, Any] = {}
        for file, names in self._listed().items():
            handle = self._handle(folder / file)
            held = set(handle.keys())
            if names is not None and held != names:
                wrong = sorted(held ^ names)[0]
                raise CheckpointError(f"{folder / INDEX}: it does not agree with {file} on {wrong}; get both again")
            for name in held:
                piece = handle.get_slice(name)
                if piece.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{folder / file}: {name} is kept as {piece.get_dtype()}; only {', '.join(DTYPES)} are read:"
                        " get the checkpoint that is not quantised"
                    )
                self.shapes[name], self.dtypes[name] = tuple(piece.get_shape()), DTYPES[piece.get_dtype()]
                self._open[name] = handle

    def _listed(self) -> dict[str, set[str] | None]:
        """File -> names of its tensors (None: whatever is in it)."""
        if (self.folder / FILE).is_file():
            return {FILE: None}
        if not (self.folder / INDEX).is_file():
            raise self._none_found()
        try:
            weight_map = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, set[str] | None] = {file: set() for file in weight_map.values()}
            for name, file in weight_map.items():
                files[file].add(name)  # type: ignore[union-attr]
            if not all(isinstance(file, str) for file in files):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(f"{self.folder / INDEX}: damaged; get it again") from None
        for file in files:
            if Path(file).name != file or not (self.folder / file).is_file():
                raise UserError(f"{self.folder}: {INDEX} names {file}, which is not there; get the whole checkpoint")
        return files

    def _none_found(self) -> UserError:
        pickles = sorted(path.name for path in self.folder.glob("*.bin")) + sorted(
            path.name for path in self.folder.glob("*.p*t*") if path.suffix in (".pt", ".pth", ".ckpt")
        )
        if not pickles:
            return UserError(f"{self.folder}: no {FILE} and no {INDEX}; get the whole checkpoint")
        return _refused(self.folder / pickles[0])

    @staticmethod
    def _handle(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            if isinstance(error, SafetensorError):  # it could be read
                with path.open("rb") as file:
                    if file.read(4).startswith(PICKLES):
                        raise _refused(path) from None
            raise CheckpointError(f"{path}: damaged or cut off ({error}); get it again") from None

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it is kept."""
        tensor: torch.Tensor = self._open[name].get_tensor(name)
        return tensor


def _refused(path: Path) -> UserError:
    return UserError(
        f"{path}: a pickle, which can run any code when it is read; get the checkpoint as {FILE}, or load it where you"
        " trust it and save it with transformers' save_pretrained"
    )


def write_tensors(
    folder: Path, groups: Iterable[tuple[dict[str, int], Callable[[], dict[str, torch.Tensor]]]], shard_bytes: int
) -> None:
    """Write groups of tensors that belong together, each given as (name -> bytes, a function that makes them).

    One file where all fit into `shard_bytes`, else shards, a group never torn, with their index.
    """
    shards: list[list[tuple[dict[str, int], Callable[[], dict[str, torch.Tensor]]]]] = [[]]
    filled = total = 0
    for sizes, make in groups:
        size = sum(sizes.values())
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((sizes, make))
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: tensor for _, make in shard for name, tensor in make().items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
