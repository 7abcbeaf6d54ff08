"""Who may attend to whom, declared once and lowered by each kernel to its own form.

B batch, T queries, S keys, H query heads. `Mask.dense` and `Mask.bias` are the definition that every kernel is tested
against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Mask:
    """Query t may see key s when every rule that is set allows it (a prefix widens `causal`).

    - `causal`: s is not after t.
    - `window` W: t sees keys less than W away: causally the W last ones, itself included.
    - `prefix_B`: the first prefix_B[b] tokens of row b are seen by the whole row (prefix LM).
    - `documents_BS`: both belong to the same document; queries are the last T keys.
    - `slots_BT`: index of each query in its row; None means that the T queries are the last of the S keys.
    - `keys_BS`: index of each key in its row, negative where the place is empty; None means 0..S-1.
    - `front` P: before all of these stand P further keys that every query sees (key/value prefixes, memories).
    - `slopes_H`: each head h adds -slopes_H[h] * |t - s| to its scores; keys in front get 0 (ALiBi).

    A mask lives for one forward pass. What is derived from it (other masks, lowered forms) is kept in `memo`, so that
    all layers share it.
    """

    causal: bool = True
    window: int | None = None
    prefix_B: torch.Tensor | None = None
    documents_BS: torch.Tensor | None = None
    slots_BT: torch.Tensor | None = None
    keys_BS: torch.Tensor | None = None
    front: int = 0
    slopes_H: torch.Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, computed the first time that `key` is asked for; by each compiled layer for itself, so that it
        finds what any other does, and all are one graph."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def with_window(self, window: int) -> Mask:
        """This mask with at most `window` keys per query, the query's own included."""
        window = window if self.window is None else min(window, self.window)
        return self.once(("window", window), lambda: replace(self, window=window))

    def with_front(self, keys: int) -> Mask:
        """This mask with `keys` more keys in front that every query sees."""
        return self.once(("front", keys), lambda: replace(self, front=self.front + keys))

    def with_slopes(self, slopes_H: torch.Tensor) -> Mask:
        """This mask with scores that fall with the distance; layers that give the same tensor share it."""
        return self.once(("slopes", slopes_H), lambda: replace(self, slopes_H=slopes_H))

    @property
    def is_plain_causal(self) -> bool:
        """True when nothing but `causal` applies."""
        return self.causal and self._has_no_other_rule

    @property
    def sees_everything(self) -> bool:
        """True when no rule applies."""
        return not self.causal and self._has_no_other_rule

    @property
    def _has_no_other_rule(self) -> bool:
        return (
            self.window is None
            and self.prefix_B is None
            and self.documents_BS is None
            and self.slots_BT is None
            and self.keys_BS is None
            and self.front == 0
            and self.slopes_H is None
        )

    def dense(self, queries: int, keys: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The mask as booleans: (B, 1, T, S) or (1, 1, T, S), true where attention is allowed. `keys` counts front."""
        t_BT1, s_B1S = self._places(queries, keys, device)
        allowed_BTS = (s_B1S <= t_BT1) if self.causal else torch.ones_like(s_B1S <= t_BT1)
        if self.prefix_B is not None:
            allowed_BTS = allowed_BTS | (s_B1S < self.prefix_B[:, None, None])
        if self.window is not None:
            allowed_BTS = allowed_BTS & ((t_BT1 - s_B1S).abs() < self.window)
        if self.documents_BS is not None:
            mine_BT1 = self.documents_BS[:, -queries:, None]
            allowed_BTS = allowed_BTS & (mine_BT1 == self.documents_BS[:, None, :])
        if self.keys_BS is not None:
            allowed_BTS = allowed_BTS & (s_B1S >= 0)
        if self.front:
            allowed_BTS = torch.nn.functional.pad(allowed_BTS, (self.front, 0), value=True)
        return allowed_BTS[:, None]

    def bias(self, queries: int, keys: int, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """What is added to the scores: (B, H, T, S) or (1, H, T, S) in fp32, None where it is nothing."""
        if self.slopes_H is None:
            return None
        t_BT1, s_B1S = self._places(queries, keys, device)
        bias_BHTS = -self.slopes_H.to(device)[:, None, None] * (t_BT1 - s_B1S).abs()[:, None]
        return torch.nn.functional.pad(bias_BHTS, (self.front, 0)) if self.front else bias_BHTS

    def _places(self, queries: int, keys: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of each query and of each key behind the front in its row, as t_BT1 and s_B1S."""
        s_BS = torch.arange(keys - self.front, device=device)[None] if self.keys_BS is None else self.keys_BS
        t_BT = s_BS[:, s_BS.shape[1] - queries :] if self.slots_BT is None else self.slots_BT
        return t_BT[:, :, None], s_BS[:, None, :]
