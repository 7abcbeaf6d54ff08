r"""Our tokenizers written as Hugging Face tokenizer.json, the format of the `tokenizers` library: same text, same ids.

The file is a pipeline: normalizer -> pre_tokenizer -> model -> decoder, and added tokens that are cut out of the text
before anything else. What we rely on:

- A BPE model merges the pair that stands first in `merges`, the leftmost first, as we do.
- ByteLevel writes bytes as visible characters (`byte_level.py`), so a piece may be any bytes.
- A special token that is also in the model's vocabulary keeps its id; one that is not would be numbered by the library.

Where that format differs from us: the names of special tokens become tokens wherever text contains them, unless it is
encoded with `split_special_tokens=True`; our `encode_with_special` does the same, our `encode` never does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

from sky_core.errors import UserError
from sky_core.tokenizer.byte_level import to_visible
from sky_core.tokenizer.pattern import for_oniguruma

Json = dict[str, Any]


def pipeline(
    model: Json,
    special: Mapping[str, int],
    *,
    decoder: Json,
    pre_tokenizer: Json | None = None,
) -> Json:
    """The whole file. `special` are the added tokens, which must be in the model's vocabulary."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": name, **flags} for name, i in sorted(special.items(), key=itemgetter(1))]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def vocabulary(names: Iterable[str], special: Mapping[str, int]) -> dict[str, int]:
    """Name -> id. `names` are those of the pieces in order, empty where an id is unused or a special token.

    Raises `UserError` when two ids share a name.
    """
    vocab: dict[str, int] = {}
    for name, i in chain(((name, i) for i, name in enumerate(names) if name), special.items()):
        if vocab.setdefault(name, i) != i:
            raise UserError(
                f"tokens {vocab[name]} and {i} are both written {name!r} in a Hugging Face tokenizer.json, which can "
                "hold that once; train the tokenizer with other special tokens"
            )
    return dict(sorted(vocab.items(), key=itemgetter(1)))


def bpe_model(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], **options: bool) -> Json:
    """A BPE model. Options: `byte_fallback`, `ignore_merges` (a pre-token that is a piece is that piece at once)."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": dict(vocab),
        "merges": [list(pair) for pair in merges],
    }


def byte_names() -> list[str]:
    """How a model with byte fallback calls the 256 bytes."""
    return [f"<0x{byte:02X}>" for byte in range(256)]


def characters(known: str, special: Mapping[str, int], *, byte_fallback: bool) -> Json:
    """One token per character of `known`, and for others their bytes; without `byte_fallback` they are an error."""
    vocab = vocabulary([*known, *(byte_names() if byte_fallback else [])], special)
    if byte_fallback:
        decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
        return pipeline(bpe_model(vocab, [], byte_fallback=True), special, decoder=decoder)
    return pipeline(
        {"type": "WordLevel", "vocab": vocab, "unk_token": "[none]"},
        special,
        pre_tokenizer=split(r"[\s\S]"),
        decoder={"type": "Fuse"},
    )


def split(pattern: str) -> Json:
    """Cuts text into what `pattern` matches and what is between."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level_bpe(
    pieces: Sequence[bytes],
    merges: Iterable[tuple[int, int]],
    special: Mapping[str, int],
    pattern: str | None,
    *,
    ignore_merges: bool = False,
) -> Json:
    """BPE over bytes; `pattern` is the regular expression that cuts the text first, None for no cut."""
    names = [to_visible(piece) for piece in pieces]
    vocab = vocabulary(names, special)
    pairs = [(names[left], names[right]) for left, right in merges]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    steps = [byte_level] if pattern is None else [split(for_oniguruma(pattern)), byte_level]
    return pipeline(
        bpe_model(vocab, pairs, ignore_merges=ignore_merges),
        special,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=byte_level,
    )
