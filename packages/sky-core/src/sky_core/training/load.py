"""From a run, a checkpoint folder or anything a plugin can load to a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sky_core.config import parse_run
from sky_core.plugins import loaded_plugins
from sky_core.quantization import quantize_
from sky_core.run_directory import find_run
from sky_core.tokenizer.files import load_tokenizer
from sky_core.training import checkpoint
from sky_core.yaml_file import read_yaml

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer


def load(source: str | Path, *, quantize: str | None = None) -> tuple[LanguageModel, Tokenizer]:
    """The model (in evaluation mode, on the CPU) and tokenizer of a run or of anything a plugin can load.

    `source` is a run (directory, name, unique prefix, `@last`, `@best`, each with `@step` behind it), a checkpoint
    folder, or `scheme:rest` for plugins (`hf:DIR`). With `quantize` the weights of its linear layers are kept in 8 or 4
    bits ("int8", "int4": `sky_core.quantization`). Raises `UserError` when there is no such thing and
    `CheckpointError` when it is damaged.
    """
    model, tokenizer = _load(str(source))
    if quantize is not None:
        quantize_(model, quantize)
    return model, tokenizer


def _load(text: str) -> tuple[LanguageModel, Tokenizer]:
    answer: tuple[LanguageModel, Tokenizer] | None = loaded_plugins().hook.sky_load_model(source=text)
    if answer is not None:
        return answer
    folder = Path(text)
    if not (folder / "MANIFEST.json").is_file():
        run, which = find_run(text.removeprefix("run:"))
        folder = run.checkpoint(which)
    return load_checkpoint(folder)


def load_checkpoint(folder: Path) -> tuple[LanguageModel, Tokenizer]:
    """Model and tokenizer of one checkpoint folder; the averaged weights when the run kept an average."""
    checkpoint.verify_checkpoint(folder)
    data, lines = read_yaml(folder / "run.yaml")
    run = parse_run(data, lines, base=folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    model: LanguageModel = run.model.build(tokenizer.vocab_size)
    for adapter in run.adapters:
        adapter.build(model)
    loaded_plugins().hook.sky_model_built(model=model, run=run)
    averages = checkpoint.load_tensors(folder, "training/ema")
    adapters = torch.nn.ModuleList(attached.module for attached in model.adapters)
    for part, module in (("model", model), ("adapters", adapters)):
        weights = checkpoint.load_tensors(folder, part)
        averaged = {name: averages.get(f"{part}.{name}", weight) for name, weight in weights.items()}
        checkpoint.load_weights(module, averaged, folder)
        module.eval()
    return model, tokenizer
