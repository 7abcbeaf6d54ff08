"""Datasets: prepared token files and shards, text that is prepared on the fly, and weighted mixtures."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from sky_core import slots
from sky_core.component import Schema, Slot
from sky_core.errors import DataError, UserError
from sky_core.slots import Dataset

if TYPE_CHECKING:
    from sky_core.data.dataset import Dataset as BuiltDataset
    from sky_core.data.prepared import TokenizerRecord
    from sky_core.data.tokens import TokenFiles

log = logging.getLogger(__name__)

SequenceLength = Annotated[int, Field(ge=1, description="tokens a sequence, each with the next one as its target")]
Documents = Annotated[
    Literal["ignore", "mask"],
    Field(description="mask: attention, positions and targets stay inside of a document; ignore: they run across"),
]
Packing = Annotated[
    Literal["stream", "best_fit"],
    Field(
        description="stream: cut the joined documents every sequence_length; best_fit: rows of whole documents, padded"
    ),
]
Verify = Annotated[bool, Field(description="compare the SHA-256 of every file when the run starts (sizes always are)")]


class NoData(Dataset):
    """No data: what a run has that was imported and not trained. It can be sampled, measured and started from."""

    kind: ClassVar = "none"

    def build(self, seed: int, tokenizer: slots.Tokenizer | None) -> BuiltDataset:
        raise DataError(
            "this run has no data (it was imported, not trained): train a run file that has `data:`, and this run as"
            " `init:`, or say which text to measure it on"
        )


class _Prepared(Schema):
    """What token files and shards have in common."""

    kind: ClassVar[str]
    stored_as: ClassVar[str]
    implementation: ClassVar = "sky_core.data.tokens:TokenFiles"

    path: Annotated[str, Field(min_length=1, description="folder that `sky data prepare` wrote")]
    sequence_length: SequenceLength = 1024
    documents: Documents = "ignore"
    packing: Packing = "stream"
    verify: Verify = True

    def build(self, seed: int, tokenizer: slots.Tokenizer | None) -> TokenFiles:
        from sky_core.data.prepared import Meta

        folder = Path(self.path)
        meta = Meta.read(folder)
        if meta.format != self.stored_as:
            raise DataError(f"{folder} holds {meta.format}; write 'kind: {meta.format}' instead of 'kind: {self.kind}'")
        if tokenizer is not None:
            _require_same_tokenizer(folder, meta.tokenizer, tokenizer)
        return self._open(folder, seed)

    def _open(self, folder: Path, seed: int) -> TokenFiles:
        from sky_core.data.tokens import TokenFiles

        return TokenFiles(
            folder,
            self.sequence_length,
            seed=seed,
            documents=self.documents,
            packing=self.packing,
            verify=self.verify,
        )


class Tokens(_Prepared, Dataset):
    """Token files, memory-mapped: the folder of `sky data prepare`."""

    kind: ClassVar = "tokens"
    stored_as: ClassVar = "tokens"


class Shards(_Prepared, Dataset):
    """Token shards that webdataset reads as well: the folder of `sky data prepare --format shards`."""

    kind: ClassVar = "shards"
    paper: ClassVar = "arXiv:2001.01858"
    stored_as: ClassVar = "shards"


class Text(Dataset):
    """Raw text, prepared when it is first used; kept in a cache that follows its content and the options here."""

    kind: ClassVar = "text"
    tokenizes: ClassVar = True
    implementation: ClassVar = "sky_core.data.tokens:TokenFiles"

    path: Annotated[
        str | list[str],
        Field(
            min_length=1, description="file or folder (txt, md, code, jsonl, tar; gz, xz, zst), `python:`, or a list"
        ),
    ]
    sequence_length: SequenceLength = 1024
    split: Annotated[
        Literal["document", "position"],
        Field(description="document: by a hash of each document's id; position: the end of the text validates"),
    ] = "document"
    validation: Annotated[float, Field(ge=0, lt=1, description="fraction that is kept for validation")] = 0.1
    documents: Documents = "ignore"
    packing: Packing = "stream"
    verify: Verify = True
    cache: Annotated[str, Field(min_length=1, description="folder for prepared text")] = ".sky/cache"

    def build(self, seed: int, tokenizer: slots.Tokenizer | None) -> TokenFiles:
        from sky_core.components.tokenizer import Char
        from sky_core.data.prepare import prepare
        from sky_core.data.prepared import META
        from sky_core.data.read import Corpus

        tokenizer = tokenizer or Char()
        corpus = Corpus([self.path] if isinstance(self.path, str) else self.path)
        key = json.dumps(
            [corpus.digest(), tokenizer.as_dict(), _fixed_fingerprint(tokenizer), self.split, self.validation]
        )
        folder = Path(self.cache) / f"text-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if (folder / META).exists():
            log.info("using the prepared text in %s", folder)
        else:
            log.info("preparing %s with tokenizer %s into %s", self.path, tokenizer.kind, folder)
            prepare(corpus, folder, tokenizer, split=self.split, validation=self.validation, reuse=True)
        options = self.model_dump(include={"sequence_length", "documents", "packing", "verify"})
        return Tokens(path=str(folder), **options)._open(folder, seed)


class Member(Schema):
    """One dataset of a mixture."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False, description="share of the sequences, in any unit")]
    data: Annotated[Slot[Dataset], Field(description="where its sequences come from")]
    name: Annotated[
        str | None,
        Field(pattern=r"^[\w.-]+$", description="what evaluations call it; null: its place in the list (1, 2, ...)"),
    ] = None


class Mixture(Dataset):
    """Several datasets in fixed proportions, which hold to within one sequence at every moment."""

    kind: ClassVar = "mixture"
    paper: ClassVar = "doi:10.1016/0012-365X(80)90269-1"

    members: Annotated[list[Member], Field(min_length=1, description="datasets and their weights")]

    def build(self, seed: int, tokenizer: slots.Tokenizer | None) -> BuiltDataset:
        from sky_core.data import mixture

        # Members that read the same folder shall not read it in the same order.
        built = [member.data.build(seed + number, tokenizer) for number, member in enumerate(self.members)]
        weighted = [(member.weight, data) for member, data in zip(self.members, built, strict=True)]
        return mixture.Mixture(weighted, [member.name or str(i) for i, member in enumerate(self.members, start=1)])


def _fixed_fingerprint(tokenizer: slots.Tokenizer) -> str | None:
    """The fingerprint of a tokenizer that has nothing to learn, None for one that is yet to be trained."""
    try:
        return tokenizer.train(()).fingerprint
    except UserError:
        return None


def _require_same_tokenizer(folder: Path, made_by: TokenizerRecord, asked: slots.Tokenizer) -> None:
    """Raise `DataError` when the run file asks for a tokenizer that did not make the data."""
    options = json.loads(json.dumps(asked.as_dict()))
    fingerprint = _fixed_fingerprint(asked)
    if fingerprint == made_by.fingerprint or (fingerprint is None and options == made_by.options):
        return
    raise DataError(
        f"{folder} was prepared with the tokenizer {json.dumps(made_by.options) if made_by.options else made_by.kind} "
        f"(fingerprint {made_by.fingerprint}), the run file asks for {json.dumps(options)} "
        f"(fingerprint {fingerprint or 'unknown: not trained'}); leave 'tokenizer:' out, "
        "or prepare the data with that one"
    )
