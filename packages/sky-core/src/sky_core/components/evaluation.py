"""Evaluations: measurements of a model, on the run's validation split or on the user's own files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sky_core.slots import Eval

BatchTokens = Annotated[int, Field(ge=1, description="tokens per forward pass (at least one sequence)")]
Name = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="what its metrics begin with: <name>/<metric>")
]
JsonLines = Annotated[
    str | list[str], Field(min_length=1, description="JSON-lines file or files (.gz, .xz, .zst too), one item a line")
]
MaxItems = Annotated[
    int | None, Field(ge=1, description="at most so many items, chosen by a hash of their content; null: all")
]


class LossEval(Eval):
    """Loss on the whole validation split: nats per token, perplexity and bits per byte."""

    kind: ClassVar = "loss"

    batch_tokens: BatchTokens = 16384

    def build(self) -> Callable[..., dict[str, float]]:
        from sky_core.eval.loss import validation_loss

        return partial(validation_loss, batch_tokens=self.batch_tokens)


class Domains(Eval):
    """Bits per byte on your own texts, domain by domain."""

    kind: ClassVar = "domains"
    needs_data: ClassVar = False

    path: Annotated[
        dict[Name, str | list[str]] | str | list[str],
        Field(
            min_length=1,
            description="texts of each domain by its name; or texts whose JSON lines name their `domain` (else: file)",
        ),
    ]
    name: Name = "domains"
    max_bytes: Annotated[int, Field(ge=1, description="read the first so many bytes of each domain")] = 1 << 20
    batch_tokens: BatchTokens = 16384

    def build(self) -> Callable[..., dict[str, float]]:
        from sky_core.eval.domains import domains

        return partial(domains, options=self)


class LastWord(Eval):
    """Predict the last word of passages of your own text (LAMBADA's own file works as it is)."""

    kind: ClassVar = "last_word"
    paper: ClassVar = "arXiv:1606.06031"
    needs_data: ClassVar = False

    path: Annotated[
        str | list[str],
        Field(min_length=1, description="text, or JSON lines with the key `text`; file, folder or list"),
    ]
    name: Name = "last_word"
    passages: Annotated[
        Literal["document", "paragraph"] | None,
        Field(description="what ends in the word; null: documents of paths ending in .jsonl, paragraphs of others"),
    ] = None
    min_words: Annotated[int, Field(ge=1, description="words of context that a paragraph's last word needs")] = 30
    word_in_context: Annotated[
        bool, Field(description="only words that occurred in their context before, as most of LAMBADA's do")
    ] = False
    max_items: MaxItems = None
    batch_tokens: BatchTokens = 16384

    def build(self) -> Callable[..., dict[str, float]]:
        from sky_core.eval.last_word import last_word

        return partial(last_word, options=self)


class Cloze(Eval):
    """Choose how a context goes on: JSON lines with `context` (or `prompt`), `choices` and `answer`, an index."""

    kind: ClassVar = "cloze"
    paper: ClassVar = "arXiv:2405.14782"
    needs_data: ClassVar = False

    path: JsonLines
    name: Name = "cloze"
    max_items: MaxItems = None
    batch_tokens: BatchTokens = 16384

    def build(self) -> Callable[..., dict[str, float]]:
        from sky_core.eval.cloze import cloze

        return partial(cloze, options=self)


class MinimalPairs(Eval):
    """Prefer the good one of two sentences: JSON lines with `good` and `bad`, and maybe a `category` (BLiMP's too)."""

    kind: ClassVar = "minimal_pairs"
    paper: ClassVar = "arXiv:1912.00582"
    needs_data: ClassVar = False

    path: JsonLines
    name: Name = "minimal_pairs"
    prefix: Annotated[str, Field(description="text before each sentence; empty: the end-of-text token")] = ""
    max_items: MaxItems = None
    batch_tokens: BatchTokens = 16384

    def build(self) -> Callable[..., dict[str, float]]:
        from sky_core.eval.minimal_pairs import minimal_pairs

        return partial(minimal_pairs, options=self)


class LmEval(Eval):
    """Tasks of lm-evaluation-harness, its own or yours in YAML (extra: lm-eval)."""

    kind: ClassVar = "lm_eval"
    paper: ClassVar = "arXiv:2405.14782"
    needs_data: ClassVar = False

    tasks: Annotated[list[str], Field(min_length=1, description="names of tasks or groups, or paths of YAML files")]
    include_path: Annotated[str | None, Field(min_length=1, description="folder with further task YAML files")] = None
    num_fewshot: Annotated[int | None, Field(ge=0, description="examples in the context; null: as the task says")] = (
        None
    )
    limit: Annotated[int | None, Field(ge=1, description="first so many items of each task; null: all")] = None
    name: Name = "lm_eval"
    batch_tokens: BatchTokens = 16384

    def build(self) -> Callable[..., dict[str, float]]:
        from sky_core.eval.harness import lm_eval_tasks

        return partial(lm_eval_tasks, options=self)
