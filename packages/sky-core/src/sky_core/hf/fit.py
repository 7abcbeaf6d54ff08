"""Which architecture of Hugging Face computes what a model of ours computes.

Every architecture may try: it writes a config.json, that is read back, and the model so described is compared with the
one given, part by part with nothing left to defaults. Only where nothing differs may it be exported; so an option that
an architecture does not know of, one of next year among them, is never lost on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sky_core.component import Component
from sky_core.components.attention import Full
from sky_core.components.layers import GEGLU, SwiGLU
from sky_core.components.model import Decoder
from sky_core.components.moe import MixtureOfExperts
from sky_core.errors import UserError
from sky_core.hf.architectures import ARCHITECTURES, Architecture, architecture
from sky_core.hf.config import Config
from sky_core.problems import problems

if TYPE_CHECKING:
    from sky_core.model.language_model import LanguageModel

Table = dict[str, Any]

TRAINING_ONLY = {"kernel", "dropout", "initializer_range", "zero_residual", "n_mtp"}
"""Options of a decoder that change no logit of the next token."""


def choose(model: LanguageModel, wanted: str | None = None) -> tuple[Architecture, Decoder, Table]:
    """(architecture, the model's resolved options, keys of config.json) for a model, of the kind `wanted` if given.

    Raises `UserError` that names what no architecture can hold.
    """
    decoder = resolved(model)
    tried = [ARCHITECTURES[name] for name in ([architecture(wanted).model_type] if wanted else ARCHITECTURES)]
    nearest: tuple[tuple[bool, int], Architecture, list[str]] | None = None
    for one in tried:
        keys = {
            **one.to_config(decoder),
            "vocab_size": decoder.vocab_size,
            "tie_word_embeddings": decoder.tie_embeddings,
            "initializer_range": decoder.initializer_range,
        }
        different, describes = differences(decoder, one, keys)
        if not different:
            return one, decoder, keys
        if nearest is None or (not describes, len(different)) < nearest[0]:
            nearest = (not describes, len(different)), one, different
    assert nearest is not None
    _, one, different = nearest
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    head = f"{one.model_type} cannot hold this model: " if wanted else "no Hugging Face architecture is this model; the"
    beside = "" if wanted else f" nearest, {one.model_type}, differs in "
    raise UserError(f"{head}{beside}{'; '.join(different[:3])}{more}")


def resolved(model: LanguageModel) -> Decoder:
    """The options of a built decoder with one attention and feed-forward part for each layer and no default widths.

    Raises `UserError` for a model that is no decoder of core, or one with adapters.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, Decoder):
        raise UserError(
            f"a model of class {type(model).__name__} has no Hugging Face form; only `kind: decoder` has one"
        )
    if model.adapters:
        raise UserError("this model has adapters, which a Hugging Face checkpoint cannot hold; merge them first")
    feedforward: list[Component] = []
    for i, block in enumerate(model.layers):
        part, module = config.feedforward[i % len(config.feedforward)], block.mlp
        if isinstance(part, MixtureOfExperts):
            if hasattr(module, "experts"):
                changed = {"d_ff": module.experts.down_proj.shape[-1], "dense_layers": 0, "d_ff_dense": None}
                feedforward.append(part.model_copy(update=changed))
            else:
                feedforward.append(_dense(part, module.down_proj.in_features))
        elif "d_ff" in type(part).model_fields:
            feedforward.append(part.model_copy(update={"d_ff": module.down_proj.in_features}))
        else:
            feedforward.append(part)
    return config.model_copy(
        update={
            "vocab_size": model.vocab_size,
            "n_kv_head": config.n_kv_head or config.n_head,
            "head_dim": config.width_of_head,
            "attention": tuple(config.attention[i % len(config.attention)] for i in range(config.n_layer)),
            "feedforward": tuple(feedforward),
        }
    )


def _dense(part: MixtureOfExperts, d_ff: int) -> Component:
    """What stands in the first, dense layers of a mixture; the part itself where that has no name of its own."""
    kinds: dict[str, type[Component]] = {"silu": SwiGLU, "gelu": GEGLU}
    return kinds[part.activation].model_validate({"d_ff": d_ff}) if part.activation in kinds else part


def differences(decoder: Decoder, one: Architecture, keys: Table) -> tuple[list[str], bool]:
    """Where a resolved decoder is not the one that `keys` describe, in words, and whether they describe one at all."""
    c = Config(keys)
    try:
        table = one.to_model(c)
        other = Decoder.model_validate(table)
    except UserError as error:
        return [str(error)], False
    except ValidationError as error:
        return [f"model.{problem}" for problem in problems(error, Decoder, table, {})], False
    c.done(one.harmless)
    ours, theirs = _flat(decoder), _flat(other)
    return [
        f"model.{path} ({ours.get(path)!r} here, {theirs.get(path)!r} there)"
        for path in dict.fromkeys([*ours, *theirs])
        if ours.get(path) != theirs.get(path)
    ], True


def _flat(decoder: Decoder) -> dict[str, Any]:
    """Path -> value of all that counts, each default as what it stands for."""
    table = {key: value for key, value in decoder.as_dict().items() if key not in TRAINING_ONLY}
    bias = table.pop("bias")
    n_layer = decoder.n_layer
    attention = [decoder.attention[i % len(decoder.attention)] for i in range(n_layer)]
    feedforward = [decoder.feedforward[i % len(decoder.feedforward)] for i in range(n_layer)]
    table["attention"] = [_attention(one, decoder, bias) for one in attention]
    table["feedforward"] = [_feedforward(one, bias) for one in feedforward]
    table["n_kv_head"], table["head_dim"] = decoder.n_kv_head or decoder.n_head, decoder.width_of_head
    table["position"] = [one.as_dict() for one in decoder.position]
    table["memory"] = [one and one.as_dict() for one in decoder.memory]
    return dict(_paths(table))


def _attention(part: Component, decoder: Decoder, bias: bool) -> Table:
    table = part.as_dict()
    if not isinstance(part, Full):
        return {**table, "model_bias": bias}
    for name in ("bias", "out_bias"):
        table[name] = bias if table[name] is None else table[name]
    table["scale"] = decoder.width_of_head**-0.5 if part.scale is None else part.scale
    return table


def _feedforward(part: Component, bias: bool) -> Table:
    table = part.as_dict()
    if not isinstance(part, MixtureOfExperts):
        return {**table, "bias": bias}
    for name in ("aux_loss", "z_loss", "bias_update", "dense_layers", "d_ff_dense"):
        del table[name]
    if part.top_groups == part.n_groups:
        table["n_groups"] = table["top_groups"] = 1
    # A bias that only balances is part of the choice as well.
    return {**table, "correction_bias": part.router == "sigmoid" or part.bias_update > 0}


def _paths(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list):
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in children:
            yield from _paths(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
