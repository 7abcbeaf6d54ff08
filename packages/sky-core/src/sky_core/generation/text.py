"""Text in, text out: `generate` on top of the token loop of `sky_core.generation.decode`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from pydantic import ValidationError

from sky_core.components.generation import Sample
from sky_core.errors import UserError
from sky_core.generation.decode import generate_tokens, stream_tokens
from sky_core.generation.drafts import make_draft

if TYPE_CHECKING:
    from pathlib import Path

    from sky_core.generation.speculative import Draft
    from sky_core.model.language_model import LanguageModel
    from sky_core.slots import Sampler
    from sky_core.tokenizer.base import Tokenizer


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt behind those that the tokenizer puts in front of every text; an empty prompt without any
    becomes the token between documents. Raises `UserError` where there is none."""
    encoded = [[*tokenizer.prompt_prefix, *ids] for ids in tokenizer.encode_batch(prompts)]
    start = tokenizer.end_of_text
    if start is None:
        if all(encoded):
            return encoded
        raise UserError("the prompt is empty and the tokenizer has no end-of-text token to start from; give a prompt")
    return [ids or [start] for ids in encoded]


def make_sampler(**options: float | None) -> Sample:
    """The sampler `sample` with those options that are not None. Raises `UserError` naming the one out of range."""
    try:
        return Sample.model_validate({name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise UserError("; ".join(problems)) from None


class Options(TypedDict, total=False):
    """Keywords of `generate` that do not decide what it returns."""

    max_new_tokens: int
    sampler: Sampler | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str]
    seed: int
    draft: str | Path | LanguageModel | Draft | None
    draft_tokens: int
    prefill_chunk: int | None


@overload
def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, *, stream: Literal[False] = ..., **options: Unpack[Options]
) -> str: ...
@overload
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: list[str],
    *,
    stream: Literal[False] = ...,
    **options: Unpack[Options],
) -> list[str]: ...
@overload
def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, *, stream: Literal[True], **options: Unpack[Options]
) -> Iterator[str]: ...
@overload
def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompt: list[str], *, stream: Literal[True], **options: Unpack[Options]
) -> Iterator[tuple[int, str]]: ...
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | list[str],
    *,
    max_new_tokens: int = 200,
    sampler: Sampler | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    draft: str | Path | LanguageModel | Draft | None = None,
    draft_tokens: int = 4,
    prefill_chunk: int | None = None,
    stream: bool = False,
) -> str | list[str] | Iterator[str] | Iterator[tuple[int, str]]:
    """The text that follows `prompt` (without it), or that follows each of several prompts.

    Either `sampler` (a component) chooses the tokens or the options of `sky_core.components.generation.Sample` do
    (temperature 0.8 when none is given, 0 is greedy). It ends at the model's end-of-text token, before the first of
    the `stop` strings, or after `max_new_tokens`. The same seed gives the same text; torch's global generators are
    neither used nor changed. With `stream`, an iterator over pieces of text made of whole characters; for several
    prompts, over (index of the prompt, piece).

    A `draft` guesses `draft_tokens` tokens ahead, so that one pass of the model may bring several; what comes out is
    distributed as without it (`sky_core.generation.speculative`), though a seed then stands for another text, except
    at temperature 0. It is a smaller model of the same tokenizer or what `load` takes for one, "lookup" (copy what
    followed earlier in the text), "mtp" (the model's own multi-token prediction), or a `Draft`, which has its own
    number of tokens. Prompts are read at once, or `prefill_chunk` tokens at a time, which bounds the memory that long
    ones take. Raises `UserError` for prompts, options and drafts that cannot be used.
    """
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    if sampler is None:
        sampler = make_sampler(**options)
    elif given := [name for name, value in options.items() if value is not None]:
        raise UserError(f"a sampler and {', '.join(given)} were given; set options on the sampler itself")
    prompts = encode_prompts(tokenizer, [prompt] if isinstance(prompt, str) else prompt)
    how: dict[str, Any] = {"sampler": sampler, "max_new_tokens": max_new_tokens, "stop": stop, "seed": seed}
    how["prefill_chunk"] = prefill_chunk
    how["draft"] = None if draft is None else make_draft(draft, tokenizer, draft_tokens)
    if stream:
        pieces = stream_tokens(model, tokenizer, prompts, **how)
        if isinstance(prompt, str):
            return (piece.text for piece in pieces if piece.text)
        return ((piece.row, piece.text) for piece in pieces if piece.text)
    texts = [generation.text for generation in generate_tokens(model, tokenizer, prompts, **how)]
    return texts[0] if isinstance(prompt, str) else texts
