"""Who is measured: ours and the peers, each built from the same weights behind the protocol of `base.py`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sky_core.component import closest
from sky_core.errors import UserError

if TYPE_CHECKING:
    from sky_core.bench.contenders.base import Contender

CONTENDERS = {
    "ours": "sky_core.bench.contenders.ours:Ours",
    "transformers": "sky_core.bench.contenders.transformers:Transformers",
    "transformers-static": "sky_core.bench.contenders.transformers:TransformersStatic",
    "litgpt": "sky_core.bench.contenders.litgpt:LitGPT",
}


def contender(name: str) -> type[Contender]:
    """The class of a contender. Raises `UserError` when it is unknown or its library cannot be imported."""
    if name not in CONTENDERS:
        raise UserError(f"--against {name}: no such peer{closest(name, list(CONTENDERS))}")
    module, _, attribute = CONTENDERS[name].partition(":")
    found: type[Contender] = getattr(importlib.import_module(module), attribute)
    found.require()
    return found


def peers_of(names: str) -> list[str]:
    """The peers of a comma-separated list (`none`: no peer). Raises `UserError` for one that cannot be had."""
    peers = [] if names == "none" else [name.strip() for name in names.split(",") if name.strip()]
    for name in peers:
        if name == "ours":
            raise UserError("--against ours: ours takes part anyway; name peers, or none")
        contender(name)
    return peers


def distributions(names: Sequence[str]) -> list[str]:
    """The distributions whose versions belong to a record with these contenders."""
    return [one for name in names for one in contender(name).distributions]
