"""A Hugging Face checkpoint as a run: everything that works on runs works on it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from sky_core.config import parse_run
from sky_core.errors import UserError
from sky_core.hf.read import read
from sky_core.hf.table import SCHEME, folder_of
from sky_core.plugins import load_plugins, loaded_plugins
from sky_core.run_directory import RunDirectory
from sky_core.training import checkpoint
from sky_core.yaml_file import dump_yaml


def import_huggingface(
    source: str, *, out: str = "runs", name: str | None = None, tags: Sequence[str] = (), plugins: Sequence[str] = ()
) -> RunDirectory:
    """Make a run directory of `hf:DIR`: done, at step 0, without data, its source under `lineage`.

    `plugins` are those that the model needs, as in a run file (none: all that are installed). Raises as
    `sky_core.hf.read.read`; nothing is written then.
    """
    folder = folder_of(source)
    if folder is None:
        raise UserError(f"{source}: what is imported is written {SCHEME}DIR, a local folder")
    chosen = [str(Path(one).resolve()) if one.endswith(".py") else one for one in plugins] or None
    load_plugins(chosen)
    found = read(folder)
    usable = re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip("-._") or "imported"
    run = parse_run(
        {
            "name": name or usable,
            "out": out,
            "tags": ["imported", *tags],
            "plugins": chosen,
            "model": found.table,
            "data": "none",
            "train": {"steps": 1, "batch_tokens": found.model.max_length},
        }
    )
    text = dump_yaml(run.as_dict())
    directory = RunDirectory.create(run, config_input=text)
    step = directory.path / "checkpoints" / checkpoint.checkpoint_name(0)
    try:
        checkpoint.save_checkpoint(
            step,
            run_yaml=text,
            tokenizer=found.tokenizer,
            tensors={"model": found.model.state_dict()},
            state={"step": 0, "versions": loaded_plugins().versions()},
        )
        checkpoint.link_checkpoint(step, "last")
        directory.update(
            state="done",
            step=0,
            parameters=found.model.n_parameters()["total"],
            lineage={
                "hf": str(folder.resolve()),
                "architecture": found.architecture.model_type,
                "dtype": found.dtype,
            },
        )
    except BaseException:
        shutil.rmtree(directory.path)
        raise
    return directory
