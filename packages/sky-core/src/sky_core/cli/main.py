"""The `sky` command. Sub-commands are imported when they are called; torch never before one needs it.

stdout carries results, stderr progress. Exit codes: 0 done, 1 failed, 2 the user's mistake, 3 diverged, 4 a check
failed, 130 interrupted (after a checkpoint).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from typing import Any

import click

from sky_core import __version__
from sky_core.component import closest
from sky_core.errors import SkyError

COMMANDS = {
    "train": ("sky_core.cli.train:train", "Train a run file in a new run directory."),
    "resume": ("sky_core.cli.train:resume", "Continue a run exactly where its last checkpoint left it."),
    "sample": ("sky_core.cli.sample:sample", "Sample text from a run."),
    "eval": ("sky_core.cli.eval:evaluate", "Measure a run on the whole validation split."),
    "import": ("sky_core.cli.hf:import_", "Make a run of a Hugging Face checkpoint."),
    "export": ("sky_core.cli.hf:export", "Write a run as a Hugging Face checkpoint."),
    "runs": ("sky_core.cli.runs:runs", "List and compare runs."),
    "show": ("sky_core.cli.show:show", "Show a resolved run: every part, where its code is, and its size."),
    "check": ("sky_core.cli.show:check", "Check a run file without building anything."),
    "schema": ("sky_core.cli.show:schema", "Print the JSON Schema of run files, for editors."),
    "plugins": ("sky_core.cli.plugins:plugins", "List plugins and what they offer."),
    "doctor": ("sky_core.cli.doctor:doctor", "Say what this machine and installation can do."),
    "data": ("sky_core.cli.data:data", "Prepare and inspect training data."),
    "tokenizer": ("sky_core.cli.tokenizer:tokenizer", "Train and inspect tokenizers."),
    "bench": ("sky_core.cli.bench:bench", "Measure speed, memory and recipes beside the peers."),
    "quickstart": ("sky_core.cli.quickstart:quickstart", "Train a first model on text that Python brings along."),
}


class LazyGroup(click.Group):
    """A group whose core commands are imported when called and whose plugin commands come from `sky_commands`."""

    _plugins_asked = False

    def _ask_plugins(self) -> None:
        if not self._plugins_asked:
            self._plugins_asked = True
            from sky_core.plugins import loaded_plugins

            loaded_plugins().hook.sky_commands(app=self)

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._ask_plugins()
        return [*COMMANDS, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            module, _, attribute = COMMANDS[name][0].partition(":")
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        self._ask_plugins()
        return self.commands.get(name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(
                error.message.rstrip(".") + closest(args[0], self.list_commands(ctx)), ctx
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self._ask_plugins()
        rows = [(name, summary) for name, (_, summary) in COMMANDS.items()]
        rows += [(name, command.get_short_help_str(80)) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@click.version_option(__version__, prog_name="sky")
def app(debug: bool) -> None:
    """skyGPT: train, sample and take apart language models.

    A first model in minutes: sky quickstart. Shell completion: eval "$(_SKY_COMPLETE=bash_source sky)".
    """
    root = logging.getLogger()
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    if not any(isinstance(handler, _Stderr) for handler in root.handlers):
        root.addHandler(_Stderr())
    for noisy in ("torch", "asyncio", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Stderr(logging.StreamHandler[Any]):
    """Writes to whatever sys.stderr is at that moment: a live display puts itself in its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; every known error is one clear line, its exit code says whose it was."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--debug" in arguments:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    # torch reads it once: memory of 2 MB and more in huge pages (Linux), a tenth of the page faults of a training step.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        sys.exit(app.main(arguments, prog_name="sky", standalone_mode=False))
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(130)
    except getattr(click.exceptions, "NoArgsIsHelpError", ()) as no_arguments:  # since click 8.2
        no_arguments.show()
        sys.exit(no_arguments.exit_code)
    except Exception as error:  # noqa: BLE001 - the one place where every error becomes a line and an exit code
        if "--debug" in arguments:
            traceback.print_exc()
        lines, code = _told(error)
        for line in lines:
            click.echo(f"sky: {line}", err=True)
        sys.exit(code)


def _told(error: Exception) -> tuple[list[str], int]:
    """What the user reads of an error, and the exit code."""
    if isinstance(error, SkyError):
        return str(error).splitlines(), error.exit_code
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        where = f"; see: {context.command_path} --help" if context else ""
        return [" ".join(error.format_message().split()).rstrip(".") + where], error.exit_code
    if isinstance(error, OSError):
        return [f"{error.filename}: {error.strerror}" if error.filename else str(error)], 1
    return [f"{type(error).__name__}: {' '.join(str(error).split())} (this is a bug; --debug shows where)"], 1
