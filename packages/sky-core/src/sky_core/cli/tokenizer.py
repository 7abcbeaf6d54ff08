"""`sky tokenizer`: train one on documents, and look at one. Torch-free."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from pydantic import ValidationError

from sky_core.component import active_catalog, closest
from sky_core.errors import ConfigError, DataError, SkyError, UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from sky_core.slots import Tokenizer
    from sky_core.tokenizer.base import Tokenizer as BuiltTokenizer

COLORS = ("blue", "green", "yellow", "magenta", "cyan")


@click.group()
def tokenizer() -> None:
    """Train and inspect tokenizers."""


@tokenizer.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("--kind", default="bpe", show_default=True, help="What kind of tokenizer: bpe, sentencepiece, char, ...")
@click.option("--vocab-size", type=int, help="Number of ids, special tokens included; short for -o vocab_size=N.")
@click.option("-o", "--option", "assignments", multiple=True, metavar="KEY=VALUE", help="Any other option of the kind.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace a tokenizer that is already in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def train(
    paths: tuple[str, ...],
    kind: str,
    vocab_size: int | None,
    assignments: tuple[str, ...],
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Learn a tokenizer from the documents in PATHS and write it to the folder given by --out.

    A run file uses it as `tokenizer: {kind: saved, path: FOLDER}`.
    """
    from sky_core.data.read import read_documents
    from sky_core.tokenizer.files import FILE

    if (out / FILE).exists() and not force:
        raise UserError(f"{out} holds a tokenizer already, and data may depend on it; give another --out, or --force")
    options = dict(_assignment(text) for text in assignments)
    if vocab_size is not None:
        options["vocab_size"] = vocab_size
    component = _component(kind, options)
    texts = _Counted(document.text for document in read_documents(paths))
    started = time.perf_counter()
    built = component.train(texts)
    try:
        built.save(out)
    except OSError as error:
        raise SkyError(f"cannot write the tokenizer to {out}: {error.strerror}") from error
    facts = {
        "folder": str(out),
        **_facts(built),
        "documents": texts.documents,
        "bytes": texts.bytes,
        "seconds": round(time.perf_counter() - started, 2),
    }
    _print(facts, as_json)


@tokenizer.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--text", help="Show how this text is cut; with --text - standard input is read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(folder: Path, text: str | None, as_json: bool) -> None:
    """Show a saved tokenizer: size, fingerprint, and what it makes of a text."""
    from sky_core.tokenizer.files import load_tokenizer

    built = load_tokenizer(folder)
    facts = {"folder": str(folder), **_facts(built)}
    if text is None:
        _print(facts, as_json)
        return
    text = _standard_input() if text == "-" else text
    ids = built.encode(text)
    pieces = [built.decode_bytes([i]).decode("utf-8", errors="backslashreplace") for i in ids]
    size = len(text.encode())
    facts |= {"tokens": len(ids), "bytes": size, "bytes_per_token": round(size / max(1, len(ids)), 3)}
    if as_json:
        _print(facts | {"ids": ids, "pieces": pieces}, as_json)
        return
    _print(facts, as_json)
    if sys.stdout.isatty():
        colored = zip(pieces, cycle(COLORS), strict=False)
        click.echo("".join(click.style(piece, fg="black", bg=color) for piece, color in colored))
    else:
        click.echo("".join(f"{i:>8}  {piece!r}\n" for i, piece in zip(ids, pieces, strict=True)), nl=False)


class _Counted:
    """Passes texts on, counts them, and tells standard error how far it is."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.documents = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        from rich.console import Console

        console = Console(stderr=True)
        with console.status("reading") as status:
            for text in self._texts:
                yield text
                self.documents += 1
                self.bytes += len(text.encode(errors="replace"))
                status.update(f"reading: {self.documents:,} documents, {self.bytes / 1e6:,.1f} MB")
        console.print(f"read {self.documents:,} documents, {self.bytes / 1e6:,.1f} MB; learning", highlight=False)


def _assignment(text: str) -> tuple[str, Any]:
    from sky_core.yaml_file import parse_value

    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--option {text!r}: write it as KEY=VALUE")
    return key, parse_value(value)


def _component(kind: str, options: dict[str, Any]) -> Tokenizer:
    """The component with these options. Raises `ConfigError` with one line per problem."""
    offered = active_catalog()["tokenizer"]
    if kind not in offered:
        from sky_core.plugins import where_to_find

        hint = where_to_find("tokenizer", kind) or closest(kind, offered)
        raise ConfigError(f"no tokenizer called {kind!r} (have: {', '.join(sorted(offered))}){hint}")
    component = offered[kind]
    if unknown := sorted(options.keys() - component.model_fields.keys()):
        keys = ", ".join(component.model_fields) or "none"
        raise ConfigError(
            [f"{kind} has no option {key!r}{closest(key, component.model_fields)}; options: {keys}" for key in unknown]
        )
    try:
        return cast("Tokenizer", component.model_validate(options))
    except ValidationError as error:
        raise ConfigError([_problem(kind, detail) for detail in error.errors()]) from None


def _problem(kind: str, detail: ErrorDetails) -> str:
    where = ".".join(map(str, detail["loc"]))
    if detail["type"] == "missing":
        return f"{kind} needs the option {where}: -o {where}=VALUE"
    if detail["type"] == "value_error":
        return f"{kind}: {where}: {detail['msg'].removeprefix('Value error, ')}"
    return f"{kind}: {where}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r}"


def _facts(built: BuiltTokenizer) -> dict[str, Any]:
    return {
        "kind": built.kind,
        "vocab_size": built.vocab_size,
        "fingerprint": built.fingerprint,
        "special": built.special,
    }


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        shown = ", ".join(f"{token} = {i}" for token, i in value.items()) or "none" if name == "special" else value
        click.echo(f"{name.replace('_', ' '):<16} {shown}")


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 (byte {error.start})") from None
