"""`sky data`: prepare text for training, look at what was prepared, and verify it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sky_core import slots
    from sky_core.data.prepare import Progress
    from sky_core.data.prepared import DocumentsMeta, Meta
    from sky_core.tokenizer.base import Tokenizer

_FOLDER = click.argument("folder", type=click.Path(path_type=Path))
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def data() -> None:
    """Prepare text for training, show and verify what was prepared."""


@data.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option(
    "--tokenizer", default="bpe", show_default=True, help="A kind (char, byte, bpe, ...) or a saved tokenizer's folder."
)
@click.option("--vocab-size", type=click.IntRange(min=1), help="Ids of a tokenizer that is trained here.")
@click.option("--split", type=click.Choice(["document", "position"]), default="document", show_default=True)
@click.option("--validation", type=float, default=0.1, show_default=True, help="Fraction kept for validation.")
@click.option("--format", type=click.Choice(["tokens", "shards", "documents"]), default="tokens", show_default=True)
@click.option("--workers", type=click.IntRange(min=1), help="Tokenizing processes  [default: the cores, at most 8]")
@click.option("--force", is_flag=True, help="Replace a prepared folder.")
@_JSON
def prepare(
    paths: tuple[str, ...],
    out: Path,
    tokenizer: str,
    vocab_size: int | None,
    split: Any,
    validation: float,
    format: Any,
    workers: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Tokenize PATHS (files, folders, `python:`) into a folder to train from.

    Read are txt, md, source code, jsonl (key `text`) and tar, each also as .gz, .xz or .zst. `--format shards` writes
    webdataset tars of tokens, `--format documents` tars of text that can be prepared later.
    """
    from sky_core.data.prepare import default_workers
    from sky_core.data.prepare import prepare as prepare_documents
    from sky_core.data.read import Corpus
    from sky_core.data.shards import write_document_shards

    corpus = Corpus(paths)
    if format == "documents":
        _print(out, write_document_shards(corpus, out, force=force), as_json)
        return
    chosen = _tokenizer(tokenizer, vocab_size)
    with _progress() as progress:
        meta = prepare_documents(
            corpus,
            out,
            chosen,
            split=split,
            validation=validation,
            format=format,
            workers=workers or default_workers(),
            force=force,
            progress=progress,
        )
    _print(out, meta, as_json)
    if not as_json:
        click.echo(f"next: a run file with  data: {{kind: {format}, path: {out}}}")


@data.command()
@_FOLDER
@_JSON
def show(folder: Path, as_json: bool) -> None:
    """What the prepared FOLDER holds."""
    from sky_core.data.prepared import read_stored

    _print(folder, read_stored(folder), as_json)


@data.command()
@_FOLDER
def verify(folder: Path) -> None:
    """Compare every file of the prepared FOLDER with what was written; exit code 4 when one differs."""
    from sky_core.data.prepared import Meta, read_stored
    from sky_core.errors import CheckFailed, DataError
    from sky_core.tokenizer.files import load_tokenizer

    stored = read_stored(folder)
    try:
        stored.verify(folder, content=True)
        if isinstance(stored, Meta):
            stored.tokenizer.require(load_tokenizer(folder / "tokenizer"), folder)
    except DataError as error:
        raise CheckFailed(str(error)) from error
    click.echo(f"{folder}: {len(stored.all_files())} files as they were written")


def _tokenizer(name: str, vocab_size: int | None) -> Tokenizer | slots.Tokenizer:
    """The component of that kind, or the tokenizer saved in that folder."""
    from pydantic import ValidationError

    from sky_core import slots
    from sky_core.component import active_catalog, closest
    from sky_core.errors import UserError
    from sky_core.tokenizer.files import load_tokenizer

    kinds = active_catalog()["tokenizer"]
    if name in kinds:
        try:
            component = kinds[name].model_validate({} if vocab_size is None else {"vocab_size": vocab_size})
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            raise UserError(f"--tokenizer {name}: {problems}") from error
        assert isinstance(component, slots.Tokenizer), "the catalogue holds tokenizers under 'tokenizer'"
        return component
    if not Path(name).is_dir():
        have = ", ".join(sorted(kinds))
        raise UserError(f"--tokenizer {name}: neither a kind (have: {have}) nor a folder{closest(name, kinds)}")
    if vocab_size is not None:
        raise UserError("--vocab-size: a saved tokenizer has the size it has; leave the option out")
    return load_tokenizer(name)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A live line on stderr; when that is no terminal, a plain line per stage and every ten seconds."""
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        last: list[Any] = ["", 0.0]

        def plain(stage: str, documents: int, characters: int) -> None:
            if stage != last[0] or time.monotonic() - last[1] > 10:
                click.echo(f"{stage}: {documents:,} documents, {characters:,} characters", err=True)
                last[:] = [stage, time.monotonic()]

        yield plain
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def live(stage: str, documents: int, characters: int) -> None:
            bar.update(task, description=f"{stage}: {documents:,} documents, {characters / 1e6:,.1f} M characters")

        yield live


def _print(folder: Path, meta: Meta | DocumentsMeta, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"path": str(folder), **meta.model_dump(mode="json")}))
        return
    if meta.format == "documents":
        click.echo(f"{folder}: {meta.documents:,} documents in {len(meta.files):,} shards of text, not tokenized yet")
        return
    made_by = meta.tokenizer
    click.echo(f"{folder}: {meta.format}, tokenizer {made_by.kind} {made_by.fingerprint} of {made_by.vocab_size:,} ids")
    for name, split in meta.splits.items():
        click.echo(
            f"  {name:<11}{split.tokens:>15,} tokens {split.documents:>11,} documents {split.bytes:>15,} bytes"
            f"   {split.bytes / split.tokens:.2f} bytes per token"
        )
    if meta.skipped:
        click.echo(f"  {meta.skipped:,} documents without text were skipped")
