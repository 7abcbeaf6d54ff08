"""A SentencePiece model that rewrites nothing, as a Hugging Face tokenizer.json (unigram or BPE with byte fallback).

The usual conversion writes a space as U+2581, which makes that character of a text a space. Here the pieces hold spaces
themselves, so no normalizer and no Metaspace is needed and every text comes back.

A unigram model of that library finds the pieces of any name in the text, those of bytes (`<0x41>`) and special tokens
too; SentencePiece does not. They get a score so low that spelling their name out in characters is always better, and
where a character of a name is no piece itself, the text is cut around it: no other piece holds it, so the cut changes
nothing. SentencePiece adds scores in 32 bits and that library in 64: segmentations as good as equal may differ.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sky_core.errors import UserError
from sky_core.tokenizer.huggingface_json import Json, bpe_model, byte_names, pipeline, split, vocabulary

NORMAL, UNKNOWN, USER_DEFINED, UNUSED, BYTE = 1, 2, 4, 5, 6
UNIGRAM, BPE = 1, 2


def pipeline_of(model: bytes, pieces: Sequence[bytes], special: Mapping[str, int]) -> Json:
    """The tokenizer.json of a model file whose id i stands for `pieces[i]`. Raises `UserError` if none is exact."""
    scores, types, model_type = _read(model)
    if model_type not in (UNIGRAM, BPE):
        raise _inexact("is neither a unigram nor a bpe model")
    if {USER_DEFINED, UNUSED} & set(types):
        raise _inexact("has user-defined or unused pieces")
    normal = {pieces[i].decode(): i for i, kind in enumerate(types) if kind == NORMAL}
    alone = {piece for piece in normal if len(piece) == 1}
    if unspelled := set("".join(normal)) - alone:
        raise _inexact(f"has pieces with {min(unspelled)!r}, which is no piece itself")
    if BYTE not in types:
        raise _inexact("has no byte fallback")
    names = iter(byte_names())
    named = ["" if kind != BYTE else next(names) for kind in types]
    for name, i in normal.items():
        named[i] = name
    vocab = vocabulary(named, special)
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    if model_type == BPE:
        ranked = sorted(normal, key=lambda piece: -scores[normal[piece]])
        merges = [pair for piece in ranked for pair in _halves(piece, normal)]
        return pipeline(bpe_model(vocab, merges, byte_fallback=True), special, decoder=decoder)
    hidden = [name for name in vocab if name not in normal]
    worst = min(scores[i] for i in normal.values()) * max(map(len, hidden)) - 1
    table = [[name, scores[i] if name in normal else worst] for name, i in vocab.items()]
    cut = "".join(f"\\x{{{ord(character):X}}}" for character in sorted(set("".join(hidden)) - alone))
    return pipeline(
        {"type": "Unigram", "unk_id": types.index(UNKNOWN), "vocab": table, "byte_fallback": True},
        special,
        pre_tokenizer=split(f"[{cut}]") if cut else None,
        decoder=decoder,
    )


def _inexact(reason: str) -> UserError:
    return UserError(
        f"this SentencePiece model {reason}, so it has no exact Hugging Face form; "
        "train one with: sky tokenizer train --kind sentencepiece"
    )


def _halves(piece: str, known: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(piece)):
        if piece[:cut] in known and piece[cut:] in known:
            yield piece[:cut], piece[cut:]


def _read(model: bytes) -> tuple[list[float], list[int], int]:
    """Scores and types of the pieces, and the type of the model (sentencepiece_model.proto)."""
    scores, types, model_type = [], [], UNIGRAM
    for field, value in _fields(model):
        if field == 1:
            piece = dict(_fields(value))
            scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
            types.append(piece.get(3, NORMAL))
        elif field == 2:
            model_type = dict(_fields(value)).get(3, UNIGRAM)
    return scores, types, model_type


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: number, and an integer or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}[key & 7] if key & 7 != 2 else varint()
        at += size
        yield key >> 3, message[at - size : at]
