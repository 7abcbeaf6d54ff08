"""What the layers of one forward pass share: positions, mask, caches, auxiliary losses, key/value prefixes.

B batch (1 in positions_BT where all rows share them), T time (tokens of this pass), S slots (keys), P prefix length,
H key/value heads, E width of a head, D model width.
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

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    mask: Mask
    end: int
    aligned: bool = True
    slots_BT: torch.Tensor | None = None
    valid_BT: torch.Tensor | None = None
    documents_BT: torch.Tensor | None = None
    cache: Cache | None = None
    embedding_BTD: torch.Tensor | None = None
    """What entered the first layer, for layers that read it again; set by the model."""
    prefixes: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Layer -> (k_BHPE, v_BHPE) that every query of that layer sees first (the tap of prefix tuning; B may be 1)."""
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    collect: dict[str, Any] | None = None
    tables: dict[str, Any] = field(default_factory=dict)
    """What is computed once per pass and read by every layer (tables of position encodings), by name."""

    @classmethod
    def begin(
        cls,
        tokens_BT: torch.Tensor,
        max_length: int,
        *,
        causal: bool = True,
        positions_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        valid_BT: torch.Tensor | None = None,
        prefix_B: torch.Tensor | None = None,
        cache: Cache | None = None,
        collect: dict[str, Any] | None = None,
    ) -> Context:
        """The context of a pass over `tokens_BT`; options as for `LanguageModel.hidden`.

        Raises `ValueError` when the tokens do not fit `max_length` or the cache, or the options contradict each other.
        """
        batch, time = tokens_BT.shape
        lengths = [0] * batch if cache is None else cache.lengths
        if len(lengths) != batch:
            raise ValueError(
                f"the batch has {batch} rows and the cache {len(lengths)}; make it with new_cache({batch})"
            )
        end = max(lengths, default=0) + time
        if cache is None and end > max_length:
            raise ValueError(f"{time} tokens, but the model's context is max_length={max_length}: cut the sequence")
        if cache is not None:
            if documents_BT is not None:
                raise ValueError("documents_BT cannot be used with a cache: give each document a row of its own")
            cache.check_room(time)
            _check_padding(cache, time, valid_BT, prefix_B)

        aligned = len(set(lengths)) <= 1
        slots_BT = torch.arange(end - time, end, device=tokens_BT.device)[None]
        if not aligned:
            starts_B = torch.tensor(lengths, device=tokens_BT.device)
            slots_BT = starts_B[:, None] + torch.arange(time, device=tokens_BT.device)
        if positions_BT is None:
            positions_BT = slots_BT
        elif positions_BT.device.type == "cpu" and positions_BT.numel() and int(positions_BT.max()) >= max_length:
            raise ValueError(f"position {int(positions_BT.max())}, but the model's context is max_length={max_length}")
        rows_slots_BT = None if aligned else slots_BT
        return cls(
            tokens_BT=tokens_BT,
            positions_BT=positions_BT,
            mask=Mask(causal=causal, prefix_B=prefix_B, documents_BS=documents_BT, slots_BT=rows_slots_BT),
            end=end,
            aligned=aligned,
            slots_BT=rows_slots_BT,
            valid_BT=valid_BT,
            documents_BT=documents_BT,
            cache=cache,
            collect=collect,
        )

    @classmethod
    def at_slots(cls, tokens_BT: torch.Tensor, slots_BT: torch.Tensor, end: int, cache: Cache) -> Context:
        """The context of a pass whose tokens go to the given slots of a cache and see its first `end`, whatever its
        rows hold: nothing in it depends on numbers of the host."""
        return cls(
            tokens_BT=tokens_BT,
            positions_BT=slots_BT,
            mask=Mask(slots_BT=slots_BT),
            end=end,
            aligned=False,
            slots_BT=slots_BT,
            cache=cache,
        )

    def layer_cache(self, layer: int) -> LayerCache | None:
        """State of that layer's attention, None when nothing is cached."""
        return None if self.cache is None else self.cache.layers[layer]

    def memory_cache(self, layer: int) -> LayerCache | None:
        """State of that layer's memory, None when nothing is carried."""
        return None if self.cache is None else self.cache.memories[layer]

    def add_loss(self, name: str, value: torch.Tensor) -> None:
        """Add a scalar (a mean over tokens) to the auxiliary loss `name`."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value


def _check_padding(cache: Cache, time: int, valid_BT: torch.Tensor | None, prefix_B: torch.Tensor | None) -> None:
    """Raise `ValueError` unless padding and prefixes of `time` more tokens are where a cache takes them."""
    if valid_BT is not None and bool((valid_BT[:, 1:] & ~valid_BT[:, :-1]).any()):
        raise ValueError("valid_BT has a real token behind padding: with a cache, pad rows on the right")
    if prefix_B is not None:
        counts = [time] * len(cache.lengths) if valid_BT is None else valid_BT.sum(1).tolist()
        for row, prefix in enumerate(prefix_B.tolist()):
            if prefix > cache.lengths[row] + counts[row]:
                raise ValueError(
                    f"row {row} has a prefix of {prefix} tokens, of which {cache.lengths[row] + counts[row]} are here:"
                    " its tokens see each other, so they must come in one pass"
                )
