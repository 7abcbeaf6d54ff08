"""A Hugging Face checkpoint to a model and its tokenizer.

Weights are fp32 in the model whatever they were in the file: that is what our checkpoints hold, and fp32 has every
bf16 and fp16 number, so writing them back in their dtype gives the same bytes. One tensor of the file is in memory at a
time.

How names and shapes fit is known before the model is built, so a wrong file is told at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from sky_core.components.model import Decoder
from sky_core.errors import CheckpointError, UserError
from sky_core.hf.architectures import Architecture
from sky_core.hf.keys import Group, plan
from sky_core.hf.table import model_table
from sky_core.hf.tensors import TensorFiles
from sky_core.problems import problems
from sky_core.tokenizer.huggingface import read_huggingface

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Read:
    """What a checkpoint folder holds; `table` is the `model:` of a run file, `dtype` that of the weights on disk."""

    model: LanguageModel
    tokenizer: Tokenizer
    table: dict[str, Any]
    architecture: Architecture
    dtype: str


def load(folder: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """Model (fp32, in evaluation mode, on the CPU) and tokenizer of a checkpoint folder. Raises as `read`."""
    found = read(folder)
    return found.model, found.tokenizer


def read(folder: str | Path) -> Read:
    """Everything that a checkpoint folder holds.

    Raises `UserError` when it is of another kind than we can compute, incomplete, or its parts do not belong together,
    and `CheckpointError` when it is damaged.
    """
    folder = Path(folder)
    architecture, table = model_table(folder)
    try:
        decoder = Decoder.model_validate({key: value for key, value in table.items() if key != "kind"})
    except ValidationError as error:
        raise UserError(f"{folder / 'config.json'}: {'; '.join(problems(error, Decoder, table, {}))}") from None
    files = TensorFiles(folder)
    rows = table["vocab_size"]
    _check_size(files, decoder, rows)
    with torch.device("meta"):
        outline = decoder.build(rows)
    groups = plan(outline.state_dict(), architecture.rules(decoder))
    names = _names(files, architecture, decoder, groups)
    tokenizer = read_huggingface(folder)
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids and its embedding {rows} rows, so they do not"
            " belong together; get the tokenizer of this checkpoint"
        )
    model = decoder.build(rows)
    state = model.state_dict()
    with torch.no_grad():
        for group in groups:
            tensors = group.layout.read([files.read(names[name]) for name in group.theirs])
            for name, tensor in zip(group.ours, tensors, strict=True):
                if not tensor.isfinite().all():
                    wrong = ", ".join(names[theirs] for theirs in group.theirs)
                    raise CheckpointError(f"{folder}: {wrong} holds NaN or infinity; damaged, get it again")
                state[name].copy_(tensor)
    kept = {str(files.dtypes[name]).removeprefix("torch.") for name in names.values()}
    return Read(model.eval(), tokenizer, table, architecture, kept.pop() if len(kept) == 1 else "mixed")


def _check_size(files: TensorFiles, decoder: Decoder, rows: int) -> None:
    """Refuse a config.json whose model is larger than the file in a single number, before an outline of it is made."""
    held = sum(math.prod(shape) for shape in files.shapes.values())
    widths = {
        "width": decoder.d_model,
        "total width of heads": decoder.n_head * decoder.width_of_head,
        "vocabulary": rows,
    }
    large = [f"{what} of {size:,}" for what, size in widths.items() if size > held]
    if decoder.n_layer > len(files.shapes):
        large = [f"depth of {decoder.n_layer:,} layers"]
    if large:
        raise UserError(
            f"{files.folder}: config.json describes a {large[0]}, and the files hold {len(files.shapes)} tensors with"
            f" {held:,} numbers: they do not belong together; get the whole checkpoint"
        )


def _names(files: TensorFiles, one: Architecture, decoder: Decoder, groups: list[Group]) -> dict[str, str]:
    """Name of a tensor -> what the file calls it. Raises `UserError` unless the file has these and no others."""
    wanted = {name: shape for group in groups for name, shape in group.theirs.items()}
    bare = not any(name.startswith(one.prefix) for name in files.shapes)
    given = {one.renamed.get(name, name): name for name in files.shapes}
    if bare:
        given = {name if name in wanted else one.prefix + name: own for name, own in given.items()}
    ignored = [re.compile(pattern) for pattern in one.not_read(decoder, given)]
    given = {name: own for name, own in given.items() if not any(pattern.fullmatch(name) for pattern in ignored)}
    head, embedding = (
        next(rule.theirs for rule in one.rules(decoder) if rule.ours == name)
        for name in ("lm_head.weight", "embed_tokens.weight")
    )
    if decoder.tie_embeddings and (second := given.pop(head, None)) is not None:
        first = given.get(embedding, second)
        if files.shapes[first] != files.shapes[second] or not torch.equal(files.read(first), files.read(second)):
            raise UserError(
                f"{files.folder}: config.json ties the head to the embedding, but {second} is another matrix; set"
                " tie_word_embeddings to false"
            )
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{own} is none of its tensors" for name, own in given.items() if name not in wanted]
    wrong += [
        f"{own} has shape {files.shapes[own]} instead of {wanted[name]}"
        for name, own in given.items()
        if name in wanted and files.shapes[own] != wanted[name]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{files.folder}: the tensors are not those of the {one.model_type} in config.json:"
            f" {'; '.join(wrong[:3])}{more}; get the whole checkpoint"
        )
    return {name: given[name] for name in wanted}
