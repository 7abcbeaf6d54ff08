"""RoPE in a config.json and in a run file.

transformers 5 writes `rope_parameters: {rope_type, rope_theta, ...}`. Before that `rope_theta` and `rope_scaling:
{type, ...}` stood beside each other, which GPT-NeoX called `rotary_emb_base` and `rotary_pct`. We read all and write
both: a reader that looks for the older ones alone would take their defaults.
"""

from __future__ import annotations

import math
from typing import Any

from sky_core.components.model import Decoder
from sky_core.components.position import DynamicScaling, Llama3Scaling, Rope, YarnScaling
from sky_core.hf.config import Config

Table = dict[str, Any]


def read_rope(c: Config, length: int, *, theta: float = 1e4, fraction: float | None = None) -> tuple[Table, int]:
    """(the `position:` of a run file, the context in tokens). `length` is `max_position_embeddings`.

    `theta` and `fraction` are the architecture's defaults; a fraction of None means that it turns whole heads. Only
    dynamic NTK reads on past `length`, by its factor.
    """
    theta = c.real("rotary_emb_base", c.real("rope_theta", theta))
    given = c.real("rotary_pct", c.real("partial_rotary_factor", None))
    found = c.take("rope_scaling", c.take("rope_parameters", {}))
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise c.refused("rope_parameters", found, "one table for all layers is needed")
    rope = Config(found, f"{c.file}: rope_parameters")
    kind = rope.take("rope_type", rope.take("type", "default"))
    turned = rope.real("partial_rotary_factor", fraction if given is None else given)
    if fraction is None and turned not in (None, 1.0):
        raise rope.refused("partial_rotary_factor", turned, "this architecture turns whole heads")
    position: Table = {"kind": "rope", "theta": rope.real("rope_theta", theta)}
    if fraction is not None and turned != 1.0:
        position["fraction"] = turned
    match kind:
        case "default":
            scaling: Table | None = None
        case "linear":
            scaling = {"kind": "linear", "factor": rope.real("factor")}
        case "dynamic":
            scaling = {"kind": "dynamic", "factor": rope.real("factor"), "original_length": length}
        case "llama3":
            scaling = {
                "kind": "llama3",
                "factor": rope.real("factor"),
                "low_freq_factor": rope.real("low_freq_factor"),
                "high_freq_factor": rope.real("high_freq_factor"),
                "original_length": rope.number("original_max_position_embeddings", length),
            }
        case "yarn":
            original = rope.number("original_max_position_embeddings", length)
            scaling = {
                "kind": "yarn",
                "factor": rope.real("factor", length / original),
                "original_length": original,
                "truncate": rope.flag("truncate", True),
            }
            # As transformers reads them, a 0 is no value.
            options = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
            scaling |= {name: value for name in options if (value := rope.real(name, None))}
        case _:
            raise rope.refused("rope_type", kind, "known here are default, linear, dynamic, llama3, yarn")
    if kind in ("default", "linear", "dynamic"):  # some files carry it though nothing reads it
        rope.only("original_max_position_embeddings", length, None)
    rope.done()
    if scaling is not None:
        position["scaling"] = scaling
    return position, math.floor(length * scaling["factor"]) if scaling and kind == "dynamic" else length


def write_rope(decoder: Decoder, *, fraction: bool = False) -> Table:
    """The keys of a model whose layers share one RoPE; `fraction`: under GPT-NeoX's older names."""
    position = decoder.position[0]
    if not isinstance(position, Rope):
        return {"max_position_embeddings": decoder.max_length, "rope_parameters": {"rope_type": "default"}}
    rope: Table = {"rope_type": "default"}
    scaling, length = position.scaling, decoder.max_length
    if scaling is not None:
        options = scaling.model_dump(exclude={"kind", "original_length"}, exclude_none=True)
        rope = {"rope_type": scaling.kind, **options}
    if isinstance(scaling, Llama3Scaling | YarnScaling):
        rope["original_max_position_embeddings"] = scaling.original_length
    if isinstance(scaling, DynamicScaling):
        length = scaling.original_length
    newer, older = {"rope_theta": position.theta}, {"rope_theta": position.theta}
    if fraction:
        newer["partial_rotary_factor"] = position.fraction
        older = {"rotary_emb_base": position.theta, "rotary_pct": position.fraction}
    return {
        "max_position_embeddings": length,
        "rope_parameters": {**rope, **newer},
        "rope_scaling": None if scaling is None else rope,
        **older,
    }
