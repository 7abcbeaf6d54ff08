"""`sky sample`: text from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sky_core.cli.quiet import quiet


@click.command()
@click.argument("run")
@click.option("--prompt", "prompts", multiple=True, help="What the text starts with; may be given several times.")
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file whose whole text is one more prompt.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=200, show_default=True)
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0 takes the most probable token.")
@click.option("--top-k", type=int, help="Keep the k most probable tokens.")
@click.option("--top-p", type=float, help="Keep the smallest set of tokens with this probability.")
@click.option("--min-p", type=float, help="Keep tokens this many times as probable as the most probable one.")
@click.option("--repetition-penalty", type=float, help="Above 1: tokens seen before become less probable.")
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same text.")
@click.option("--n", type=click.IntRange(min=1), default=1, show_default=True, help="Samples of each prompt.")
@click.option("--draft", help="Guess ahead with a smaller run of the same tokenizer, or with: lookup, mtp.")
@click.option("--draft-tokens", type=click.IntRange(min=1), default=4, show_default=True, help="Tokens to guess ahead.")
@click.option("--quantize", metavar="FORMAT", help="Weights in fewer bits, faster on CPUs: int8, int4 (group-wise).")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="What weights and cache are held and multiplied in; auto: bf16 where the hardware has it (faster).",
)
@click.option("--compile", "compiled", is_flag=True, help="Compile decoding: up to a minute once, then faster.")
@click.option("--stream/--no-stream", default=True, help="Show text as it comes (one sample only).")
@click.option("--json", "as_json", is_flag=True, help="Print prompt, text, tokens, log-probabilities and why it ended.")
def sample(
    run: str,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    stop: tuple[str, ...],
    seed: int,
    n: int,
    draft: str | None,
    draft_tokens: int,
    quantize: str | None,
    precision: str,
    compiled: bool,
    stream: bool,
    as_json: bool,
) -> None:
    """Sample text from RUN: a run directory, a run's name or unique prefix, @last, @best, or name@step.

    Without a prompt the text starts as a document does. With --draft one pass of RUN may bring several tokens; the
    text is distributed as without it, and a line at the end says how many guesses were right.
    """
    if compiled and draft is not None:
        raise click.UsageError("--compile compiles steps of one token, and --draft takes none: leave one of them out")

    import json
    from dataclasses import asdict
    from itertools import chain, islice

    import torch

    from sky_core.api import load
    from sky_core.errors import UserError
    from sky_core.generation.decode import generate_tokens, stream_tokens
    from sky_core.generation.drafts import make_draft
    from sky_core.generation.text import encode_prompts, make_sampler
    from sky_core.quantization import quantize_
    from sky_core.training.precision import resolve_precision

    sampler = make_sampler(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    texts = list(prompts)
    if prompt_file is not None:
        try:
            texts.append(prompt_file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{prompt_file}: not UTF-8 text (byte {error.start}); convert it first") from error
    texts = [text for text in texts or [""] for _ in range(n)]
    with quiet():
        model, tokenizer = load(run)
        guesser = None if draft is None else make_draft(draft, tokenizer, draft_tokens)
    if quantize is not None:
        quantize_(model, quantize)
    if precision != "fp32" and resolve_precision(precision, next(model.parameters()).device) == "bf16":
        for module in (model, *(attached.module for attached in model.adapters)):
            module.to(torch.bfloat16)
    if compiled:
        model.compile_decoding()
    ids = encode_prompts(tokenizer, texts)
    options: dict[str, Any] = {"sampler": sampler, "max_new_tokens": max_new_tokens, "stop": stop, "seed": seed}
    options["draft"] = guesser

    if len(texts) == 1 and stream and not as_json:
        pieces = stream_tokens(model, tokenizer, ids, **options)
        first = list(islice(pieces, 1))  # what is wrong with the options shows before anything is written
        click.secho(texts[0], bold=True, nl=False)
        for piece in chain(first, pieces):
            click.echo(piece.text, nl=False)
        click.echo()
        return
    generations = generate_tokens(model, tokenizer, ids, **options)
    if as_json:
        records = [{"prompt": text, **asdict(done)} for text, done in zip(texts, generations, strict=True)]
        click.echo(json.dumps(records, ensure_ascii=False, indent=2))
        return
    for i, (text, generation) in enumerate(zip(texts, generations, strict=True)):
        if i:
            click.echo("-" * 20)
        click.secho(text, bold=True, nl=False)
        click.echo(generation.text)
