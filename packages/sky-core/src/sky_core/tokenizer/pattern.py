r"""Cutting text into pre-tokens: merges never cross these borders, so `dog.` and `dog!` share the token `dog`.

gpt2      Radford et al. 2019, `encoder.py`: contractions, then runs of letters, of digits and of anything else,
          each with at most one space before it; of a run of spaces the last goes with the word that follows.
gpt4      tiktoken's cl100k_base: contractions in any case, any one character (not only a space) before letters, at
          most three digits, line ends kept with what is before them.
nanochat  gpt4 with at most two digits, which wastes fewer ids of a small vocabulary, and single line ends.
llama3    Llama 3's, from its tokenizer.json: cuts as gpt4 does, written without possessive quantifiers.
qwen2     Qwen 2 and 3: gpt4 with every digit alone.
o200k     tiktoken's o200k_base (GPT-4o): words cut where lower case turns to upper, contractions kept with the word.

Any other text is taken for a regular expression of the `regex` package.
"""

from __future__ import annotations

import regex

from sky_core.component import closest
from sky_core.errors import UserError

PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "gpt4": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
        r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
    ),
    "nanochat": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
        r"""|\s*[\r\n]|\s+(?!\S)|\s+"""
    ),
    "llama3": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
        r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
    "qwen2": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
        r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
    "o200k": (
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
}

_OTHERWISE_IN_ONIGURUMA = regex.compile(
    r"(?<!\\)(?:\\\\)*(?:\{[\d,]+\}\+|\^(?<!\[\^)|\$|&&|--|\|\||~~|\[\[|\\[mMKRXGNL<>]|\(\?(?!:|i:|=|!|<=|<!|>))"
)
"""What the engine of Hugging Face's tokenizers (Oniguruma, Ruby syntax) reads in another way than `regex`."""


def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """The compiled `pattern`: a name of PATTERNS or a regular expression. Raises `UserError` when it is neither."""
    if pattern in PATTERNS:
        return regex.compile(PATTERNS[pattern])
    if pattern.isidentifier():
        raise UserError(f"no pattern called {pattern!r} (have: {', '.join(PATTERNS)}){closest(pattern, PATTERNS)}")
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise UserError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups:
        raise UserError(f"the pattern {pattern!r} captures groups; write (?:...) instead of (...)")
    return compiled


def split(compiled: regex.Pattern[str], text: str) -> list[str]:
    """The pre-tokens of `text`, in order. Raises `UserError` when the pattern leaves something out."""
    pieces: list[str] = compiled.findall(text)
    if sum(map(len, pieces)) != len(text):
        end = 0
        for match in compiled.finditer(text):
            if match.start() > end:
                break
            end = match.end()
        raise UserError(
            f"the pattern {compiled.pattern!r} leaves out {text[end]!r} at character {end}; "
            "every character must match: end it with |(?s:.)"
        )
    return pieces


def for_oniguruma(pattern: str) -> str:
    """A regular expression that cuts in Oniguruma as `pattern` does here. Raises `UserError` when that is not certain.

    There `{1,3}+` repeats what is possessive here, and `$` also stands before a line end: the patterns known by name
    are written without, which changes no cut of theirs.
    """
    if pattern == PATTERNS["gpt4"]:
        return PATTERNS["llama3"]
    if pattern in PATTERNS.values():
        return pattern.replace(r"\s++$", r"\s++\z")
    if found := _OTHERWISE_IN_ONIGURUMA.search(pattern):
        raise UserError(
            f"the pattern {pattern!r} has {found[0]!r}, which Hugging Face's tokenizers read in another way; "
            f"train the tokenizer with one of {', '.join(PATTERNS)}"
        )
    return pattern
