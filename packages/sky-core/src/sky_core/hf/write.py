"""A model and its tokenizer to a Hugging Face checkpoint that transformers 5 loads.

    config.json  generation_config.json  model.safetensors (or shards)  tokenizer.json  tokenizer_config.json ...

The folder appears whole or not at all: it is written under another name and renamed. A head that is tied to the
embedding is not written a second time.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from sky_core.errors import CheckpointError, UserError
from sky_core.files import sync_file, sync_folder, write_json
from sky_core.hf import config
from sky_core.hf.fit import choose
from sky_core.hf.keys import Group, plan
from sky_core.hf.tensors import write_tensors
from sky_core.tokenizer.huggingface import write_huggingface

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALWAYS_FP32 = ("e_score_correction_bias",)
"""Names of tensors that transformers keeps in fp32: a choice flips on a rounding error."""


def export(
    model: LanguageModel,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = 5_000_000_000,
    architecture: str | None = None,
    without_mtp: bool = False,
) -> Path:
    """Write `model` and `tokenizer` to `folder`, which must be new or empty; returns it.

    `dtype` is float32 or bfloat16, `shard_bytes` the most that one file of weights holds, `architecture` the
    `model_type` to write where several could hold the model; `without_mtp` leaves modules of multi-token prediction
    out, for which none has a place. Raises `UserError` where none can, where the tokenizer has
    no Hugging Face form, or where something is in the folder already; `CheckpointError` when it cannot be written.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not written; use one of {', '.join(DTYPES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something in it already; give a new folder, or delete this one first")
    one, decoder, keys = choose(model, architecture)
    if model.n_mtp and not without_mtp:
        raise UserError(
            f"the model has {model.n_mtp} modules of multi-token prediction, for which {one.model_type} has no place;"
            " the next token does not need them: leave them out with --without-mtp (without_mtp=True)"
        )
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    groups = plan(state, one.rules(decoder))

    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.end_of_text}
    content = {"architectures": [one.class_name], "model_type": one.model_type, "dtype": dtype, **keys, **ends}
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write_huggingface(tokenizer, temporary, max_length=model.max_length)
        write_json(temporary / config.FILE, {**content, "pad_token_id": None})
        write_json(temporary / "generation_config.json", {"_from_model_config": True, **ends})
        kept = DTYPES[dtype]
        write_tensors(
            temporary,
            [(_sizes(group, kept), partial(_tensors, group, state, kept)) for group in groups],
            shard_bytes,
        )
        for file in temporary.iterdir():
            sync_file(file)
        sync_folder(temporary)
        temporary.replace(folder)  # an empty folder gives way
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the checkpoint could not be written ({error}); nothing was left") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _tensors(group: Group, state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a group as a file holds them."""
    found = group.layout.write([state[name].detach() for name in group.ours])
    return {
        name: tensor.to("cpu", _kept(name, dtype), copy=True).contiguous()
        for name, tensor in zip(group.theirs, found, strict=True)
    }


def _sizes(group: Group, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each tensor of a group."""
    return {name: torch.Size(shape).numel() * _kept(name, dtype).itemsize for name, shape in group.theirs.items()}


def _kept(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(ALWAYS_FP32) else dtype
