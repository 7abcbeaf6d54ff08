"""`sky import` and `sky export`: Hugging Face checkpoints to runs, and runs to Hugging Face checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

import click

from sky_core.cli.quiet import quiet

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Size(click.ParamType):
    """A number of bytes: 5GB, 800MB, 1000000."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", value.strip(), re.IGNORECASE)
        size = int(float(found[1]) * UNITS[(found[2] or "").upper()]) if found else 0
        if size < 1:
            self.fail(f"{value!r} is no size; write 5GB, 800MB or a number of bytes", param, ctx)
        return size


@click.command("import")
@click.argument("source", metavar="hf:DIR")
@click.option("--out", default="runs", show_default=True, help="Folder of run directories.")
@click.option("--name", help="Name of the run; as the folder's by default.")
@click.option("--tag", "tags", multiple=True, help="A word to find the run by; may be given several times.")
@click.option("--plugin", "plugins", multiple=True, help="A plugin that the model needs; as in a run file.")
def import_(source: str, out: str, name: str | None, tags: tuple[str, ...], plugins: tuple[str, ...]) -> None:
    """Make a run of a Hugging Face checkpoint: hf:DIR, a local folder with config.json, safetensors and tokenizer.

    The run can be sampled, evaluated, listed, exported, and other runs start from it (init: RUN). It has no data, so it
    cannot be resumed.
    """
    from sky_core.training.imported import import_huggingface

    with quiet():
        run = import_huggingface(source, out=out, name=name, tags=tags, plugins=plugins)
    info = run.info
    click.echo(
        f"{info['lineage']['architecture']}, {info['parameters']:,} parameters, {info['lineage']['dtype']} on disk"
    )
    click.echo(f"run      {run.path}")
    click.echo(f'sample   sky sample {run.path} --prompt "..."')
    click.echo(f"train    a run file with `init: {run.path}`, `data:` and `train:`, and no `model:`")


@click.command()
@click.argument("run")
@click.option(
    "--hf", "folder", required=True, type=click.Path(path_type=Path), help="The folder to write; new or empty."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--shard-size", type=Size(), default="5GB", show_default=True, help="Most that one file of weights holds."
)
@click.option("--architecture", help="model_type to write, where several could hold the model.")
@click.option("--without-mtp", is_flag=True, help="Leave the modules of multi-token prediction out.")
def export(run: str, folder: Path, dtype: str, shard_size: int, architecture: str | None, without_mtp: bool) -> None:
    """Write RUN (a directory, name, unique prefix, @last, @best, name@step) as a Hugging Face checkpoint.

    AutoModelForCausalLM and AutoTokenizer of transformers load the folder. Averaged weights are written where the run
    kept an average.
    """
    from sky_core.api import load
    from sky_core.hf import export

    with quiet():
        model, tokenizer = load(run)
        export(
            model,
            tokenizer,
            folder,
            dtype=dtype,
            shard_bytes=shard_size,
            architecture=architecture,
            without_mtp=without_mtp,
        )
    click.echo(f"wrote {folder}")
