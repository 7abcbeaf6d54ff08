"""What the layers of one forward pass share: positions, mask, caches, auxiliary losses, key/value prefixes.

B batch, T time (tokens of this pass), S slots (keys), P prefix length, H key/value heads, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sky_core.model.cache import Cache, LayerCache
from sky_core.model.mask import Mask


@dataclass
class Context:
    """One forward pass.

    `slots_BT` is the index of each token in its row's sequence, cached tokens included; `positions_BT` is what the
    position encoding sees (it may restart with each document). When every row holds equally many tokens the pass is
    `aligned` and `slots_BT` is None: token t lies in slot `end - T + t`. `end` is one past the last slot of any row.
    """

    positions_BT: torch.Tensor
    mask: Mask
    end: int
    aligned: bool = True
    slots_BT: torch.Tensor | None = None
    valid_BT: torch.Tensor | None = None
    cache: Cache | None = None
    prefixes: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Layer -> (k_BHPE, v_BHPE) that every query of that layer sees first (the tap of prefix tuning)."""
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    collect: dict[str, Any] | None = None

    def layer_cache(self, layer: int) -> LayerCache | None:
        """State of that layer's attention, None when nothing is cached."""
        return None if self.cache is None else self.cache.layers[layer]

    def memory_cache(self, layer: int) -> LayerCache | None:
        """State of that layer's memory, None when nothing is carried."""
        return None if self.cache is None else self.cache.memories[layer]

    def add_loss(self, name: str, value: torch.Tensor) -> None:
        """Add a scalar (a mean over tokens) to the auxiliary loss `name`."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value
