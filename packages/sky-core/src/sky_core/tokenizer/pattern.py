r"""Cutting text into pre-tokens: merges never cross these borders, so `dog.` and `dog!` share the token `dog`.

gpt2      Radford et al. 2019, `encoder.py`: contractions, then runs of letters, of digits and of anything else,
          each with at most one space before it; of a run of spaces the last goes with the word that follows.
gpt4      tiktoken's cl100k_base: contractions in any case, any one character (not only a space) before letters, at
          most three digits, line ends kept with what is before them.
nanochat  gpt4 with at most two digits, which wastes fewer ids of a small vocabulary, and single line ends.

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
}


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
