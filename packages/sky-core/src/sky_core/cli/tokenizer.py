"""`sky tokenizer`: train one on documents, take over or hand on one of another program, look at one. Torch-free."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    """Train, import, export and inspect tokenizers."""


OUT = click.Path(file_okay=False, path_type=Path)
options_of = click.option("-o", "--option", "assignments", multiple=True, metavar="KEY=VALUE", help="Any other option.")
special_of = click.option("--special", multiple=True, metavar="NAME", help="A further special token; repeatable.")
chat_template_of = click.option("--chat-template", help="How conversations are written: chatml, or a Jinja file.")
force_of = click.option("--force", is_flag=True, help="Replace a tokenizer that is already in the folder.")
json_of = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@tokenizer.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("--kind", default="bpe", show_default=True, help="What kind of tokenizer: bpe, sentencepiece, char, ...")
@click.option("--vocab-size", type=int, help="Number of ids, special tokens included; short for -o vocab_size=N.")
@special_of
@chat_template_of
@options_of
@click.option("--out", type=OUT, required=True, help="Folder to write.")
@force_of
@json_of
def train(
    paths: tuple[str, ...],
    kind: str,
    vocab_size: int | None,
    special: tuple[str, ...],
    chat_template: str | None,
    assignments: tuple[str, ...],
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Learn a tokenizer from the documents in PATHS and write it to the folder given by --out.

    A run file uses it as `tokenizer: {kind: saved, path: FOLDER}`.
    """
    from sky_core.data.read import read_documents

    _refuse_existing(out, force)
    component = _component(kind, _options(assignments, special, chat_template, vocab_size=vocab_size))
    texts = _Counted(document.text for document in read_documents(paths))
    started = time.perf_counter()
    built = component.train(texts)
    _save(built, out)
    facts = {
        "folder": str(out),
        **_facts(built),
        "documents": texts.documents,
        "bytes": texts.bytes,
        "seconds": round(time.perf_counter() - started, 2),
    }
    _print(facts, as_json)


@tokenizer.command("import")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@special_of
@chat_template_of
@options_of
@click.option("--out", type=OUT, required=True, help="Folder to write.")
@force_of
@json_of
def import_(
    path: Path,
    special: tuple[str, ...],
    chat_template: str | None,
    assignments: tuple[str, ...],
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Take over a tokenizer of another program and write it to the folder given by --out.

    PATH is a Hugging Face tokenizer.json or its folder, a file of tiktoken ranks (-o pattern=o200k), or a
    SentencePiece model.
    """
    _refuse_existing(out, force)
    kind, option = _format_of(path)
    options = _options(assignments, special, chat_template) | {option: str(path)}
    built = _component(kind, options).train(())
    _save(built, out)
    lossless = getattr(built, "lossless", True)
    _print({"folder": str(out), **_facts(built), "lossless": lossless}, as_json)


@tokenizer.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--hf", "out", type=OUT, required=True, help="Folder to write for transformers' AutoTokenizer.")
@click.option("--max-length", type=click.IntRange(min=1), help="The model's context in tokens, for its configuration.")
@force_of
def export(folder: Path, out: Path, max_length: int | None, force: bool) -> None:
    """Write a saved tokenizer as a Hugging Face folder, with the same ids for the same text."""
    from sky_core.tokenizer.files import load_tokenizer
    from sky_core.tokenizer.huggingface import write_huggingface

    _refuse_existing(out, force)
    built = load_tokenizer(folder)
    with _writing(out):
        write_huggingface(built, out, max_length=max_length)
    click.echo(f"{out}: {built.kind}, {built.vocab_size:,} ids")


@tokenizer.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--text", help="Show how this text is cut; with --text - standard input is read.")
@json_of
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
    pieces = [built.piece_bytes(i).decode("utf-8", errors="backslashreplace") for i in ids]
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


def _refuse_existing(out: Path, force: bool) -> None:
    from sky_core.tokenizer.files import FILE

    if (out / FILE).exists() and not force:
        raise UserError(f"{out} holds a tokenizer already, and data may depend on it; give another folder, or --force")


def _options(
    assignments: tuple[str, ...], special: tuple[str, ...], chat_template: str | None, **further: Any
) -> dict[str, Any]:
    given = {"special": list(special) or None, "chat_template": chat_template, **further}
    options = dict(_assignment(text) for text in assignments)
    return options | {key: value for key, value in given.items() if value is not None}


def _format_of(path: Path) -> tuple[str, str]:
    """The kind of tokenizer that reads a file, and the option that takes it."""
    if path.is_dir() or path.suffix == ".json":
        return "huggingface", "path"
    if path.suffix == ".tiktoken":
        return "tiktoken", "path"
    with path.open("rb") as file:
        first = file.readline(1 << 10).split()
    ranked = len(first) == 2 and first[1].isdigit()  # both kinds are called tokenizer.model
    return ("tiktoken", "path") if ranked else ("sentencepiece", "model")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SkyError(f"cannot write the tokenizer to {out}: {error.strerror}") from error


def _save(built: BuiltTokenizer, out: Path) -> None:
    with _writing(out):
        built.save(out)


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
        "chat_template": built.chat_template is not None,
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
