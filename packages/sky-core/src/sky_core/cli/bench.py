"""`sky bench`: ours and the peers measured beside each other. Torch is imported when a benchmark runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from sky_core.bench import defaults
from sky_core.bench.defaults import joined

Command = Callable[..., None]


@click.group()
def bench() -> None:
    """Measure speed, memory and recipes beside the peers, and the machine's own ceilings in the same run.

    A record (JSON), its table (Markdown) and its plot (SVG) go to benchmarks/results/ of the repository, or to --out.
    """


def _settings(function: Command) -> Command:
    """The options that every benchmark has, handed over as `settings`."""

    @click.option("--out", type=click.Path(path_type=Path), help="Result file (.json) or folder.")
    @click.option("--name", help="Name of the record  [default: from what is measured]")
    @click.option("--smoke", is_flag=True, help="The smallest run that goes through everything; it measures nothing.")
    @click.option("--allow-dirty", is_flag=True, help="Measure although files differ from the commit; they are listed.")
    @click.option(
        "--compare",
        type=click.Path(path_type=Path),
        help="Exit with 4 when a ratio fell since this record by more than the spread of both.",
    )
    @wraps(function)
    def command(
        out: Path | None, name: str | None, smoke: bool, allow_dirty: bool, compare: Path | None, **options: Any
    ) -> None:
        from sky_core.bench.report import Settings

        function(settings=Settings(out, name, smoke, allow_dirty, compare), **options)

    return command


def _count(name: str, default: int, text: str) -> Callable[[Command], Command]:
    return click.option(name, type=click.IntRange(min=1), default=default, show_default=True, help=text)


_SHAPE = click.option(
    "--shape", help="A preset of recipes/models, or the path of a preset or run file.  [default: sky-50m]"
)
_AGAINST = click.option(
    "--against", default="transformers,litgpt", show_default=True, help="Peers, separated by commas; none for none."
)
_PRECISION = click.option(
    "--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True, help="What is computed in."
)
_COMPILE = click.option(
    "--compile/--no-compile", default=True, show_default=True, help="Compile each contender as its users would."
)
_LENGTH = _count("--length", defaults.LENGTH, "Tokens of a sequence.")
_BATCH = _count("--batch", defaults.BATCH, "Sequences of a step.")
_ROUNDS = _count("--rounds", 5, "Times that each contender is timed.")


def _numbers(kind: type) -> Callable[[click.Context, click.Parameter, str], list[Any]]:
    """A comma-separated list of positive numbers."""

    def read(context: click.Context, parameter: click.Parameter, text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or min(values) <= 0:
            raise click.BadParameter(f"{text!r} is no list of positive numbers such as 1,8", context, parameter)
        return values

    return read


@bench.command()
@_SHAPE
@_LENGTH
@_BATCH
@_AGAINST
@_PRECISION
@_COMPILE
@_ROUNDS
@_count("--warmup", 2, "Steps of each before the first that counts (the first one compiles).")
@_settings
def train(**options: Any) -> None:
    """Training: tokens/s, FLOP/s, share of the machine's matrix product. Losses must agree before it is timed."""
    from sky_core.bench.train import run

    run(**options)


@bench.command()
@_SHAPE
@_LENGTH
@_BATCH
@_AGAINST
@_PRECISION
@_COMPILE
@_count("--steps", 3, "Training steps after the first.")
@_count("--repeats", 1, "Processes for each contender.")
@_settings
def memory(**options: Any) -> None:
    """Peak memory of training steps, each contender in a process of its own."""
    from sky_core.bench.memory import run

    run(**options)


@bench.command()
@_SHAPE
@click.option(
    "--batch", "batches", default=joined(defaults.BATCHES), show_default=True, callback=_numbers(int),
    help="Rows, in turn.",
)  # fmt: skip
@_count("--prompt", defaults.PROMPT, "Tokens of a prompt; of the longest with --requests.")
@_count("--new", defaults.NEW, "Tokens to follow it; at most, with --requests.")
@_AGAINST
@_PRECISION
@click.option("--quantize", default="", help="Further formats of ours beside --precision: int8,int4.")
@_COMPILE
@_ROUNDS
@click.option("--requests", type=click.IntRange(min=1), help="Measure so many requests of mixed length instead.")
@_count("--rows", defaults.ROWS, "Requests that are decoded at a time, with --requests.")
@_settings
def decode(
    requests: int | None, rows: int, batches: list[int], prompt: int, new: int, quantize: str, **options: Any
) -> None:
    """Decoding: tokens/s and the share of the memory's limit. Texts and compiled steps must agree before that."""
    if requests is not None:
        if quantize:
            raise click.UsageError("--quantize does not go with --requests")
        from sky_core.bench.requests import run as serve

        serve(requests=requests, rows=rows, longest_prompt=prompt, longest_output=new, **options)
        return
    from sky_core.bench.decode import run

    formats = [one.strip() for one in quantize.split(",") if one.strip()]
    run(batches=batches, prompt=prompt, new=new, formats=formats, **options)


@bench.command()
@_count("--tokens", defaults.FILE_TOKENS, "Tokens in the file.")
@_count("--batch", defaults.FILE_BATCH, "Sequences of a batch.")
@_LENGTH
@_count("--rounds", 21, "Times that each way is timed.")
@_count("--batches", 100, "Batches of a timing.")
@_settings
def load(**options: Any) -> None:
    """Reading training batches: token files, tar shards, nanoGPT's get_batch."""
    from sky_core.bench.load import run

    run(**options)


@bench.command()
@_SHAPE
@_count("--batch-tokens", defaults.STEP_TOKENS, "Tokens of the training step that an optimizer's share is of.")
@_LENGTH
@_BATCH
@click.option("--compile/--no-compile", default=True, show_default=True, help="Compile the layers, as in training.")
@_ROUNDS
@_settings
def optimizer(**options: Any) -> None:
    """An optimizer step: AdamW written out, fused and torch's; Muon, ours and torch's. Its share of a training step."""
    from sky_core.bench.optimizer import run

    run(**options)


@bench.command()
@_count("--starts", 5, "Times that the run is started.")
@click.option("--compile/--no-compile", default=False, show_default=True, help="Also measure the compile time.")
@_settings
def start(**options: Any) -> None:
    """Seconds from starting `sky train` to the end of the first training step."""
    from sky_core.bench.start import run

    run(**options)


@bench.command()
@click.argument("recipes_and_overrides", nargs=-1, required=True, metavar="A.yaml B.yaml... [OVERRIDES]...")
@_count("--seeds", 3, "Runs of each recipe.")
@click.option("--first-seed", type=click.IntRange(min=0), default=1337, show_default=True, help="Then the next ones.")
@click.option("--tokens", type=click.IntRange(min=1), help="Compare after so many tokens.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Compare after so much training time.")
@click.option(
    "--confidence",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Of the intervals.",
)
@_settings
def recipe(recipes_and_overrides: tuple[str, ...], **options: Any) -> None:
    """Compare recipes at equal tokens and at equal time, over seeds, with confidence intervals.

    OVERRIDES are dotted and change every recipe: data.path=corpus.txt.
    """
    from sky_core.bench.recipe import run

    files = [Path(one) for one in recipes_and_overrides if "=" not in one]
    run(recipes=files, overrides=[one for one in recipes_and_overrides if "=" in one], **options)


@bench.command()
@_SHAPE
@_LENGTH
@_BATCH
@click.option("--axes", default=joined(defaults.AXES), show_default=True, help="What is varied, one at a time.")
@click.option(
    "--factors",
    default=joined(defaults.FACTORS),
    show_default=True,
    callback=_numbers(float),
    help="Times the base's size.",
)
@_PRECISION
@click.option("--compile/--no-compile", default=False, show_default=True, help="Compile the layers.")
@_count("--steps", 3, "Timed training steps of each point.")
@_settings
def scaling(**options: Any) -> None:
    """Time and memory of a training step against length, width, depth, batch, vocabulary: exponents, and on paper."""
    from sky_core.bench.scaling import run

    run(**options)


@bench.command()
@click.argument("new", type=click.Path(path_type=Path))
@click.argument("base", type=click.Path(path_type=Path))
def compare(new: Path, base: Path) -> None:
    """Exit with 4 when a ratio of the record NEW fell since BASE by more than the spread of both."""
    from sky_core.bench.report import check, read

    check(read(new), read(base), str(base))
