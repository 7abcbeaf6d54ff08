"""Adapters live outside the model they change and touch it in four places only.

    linear      y = W x of one projection          -> f(x, y)                (LoRA, DoRA, (IA)³, bottleneck adapters)
    prefix      the keys and values of a layer     -> P further ones in front (prefix tuning)
    embedding   x_BTD of the token embedding       -> f(tokens_BT, x_BTD)    (soft prompts, new tokens)
    hidden      h_BTD after the final norm         -> f(states, h_BTD), states the residual stream before the first
                                                      and after every block  (side networks of a frozen backbone)

An adapter's `build(model)` makes its own module, attaches it and returns the `Attached`:

    attached = Attached(model, LoRA(...))
    for path, linear in linears(model, ["q_proj", "v_proj"]).items():
        attached.linear(linear, lambda x, y, delta=...: y + delta(x))

The base is frozen while anything is attached; its weights and the names of its state dict never change, so what is
taken off with `detach()` leaves the very model that was there before. Attach before `compile_layers`.

B batch (1 where all rows share a prefix), T time, D model width, P prefix length, G key/value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sky_core.component import closest
from sky_core.errors import UserError
from sky_core.model.context import Context
from sky_core.model.language_model import LanguageModel

Prefixes = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> (k_BGPE, v_BGPE)."""


class Attached:
    """A module attached to `model` by its taps. `module` holds what is trained, and its state dict is the adapter's."""

    def __init__(self, model: LanguageModel, module: nn.Module) -> None:
        self.model = model
        self.module = module
        self._undo: list[Callable[[], None]] = []
        self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        model.adapters.append(self)

    def linear(self, linear: nn.Module, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """The output y of `linear` becomes `function(x, y)`."""
        self._hook(linear, lambda _, inputs, y: function(inputs[0], y))

    def prefix(self, function: Callable[[], Prefixes], tokens: int) -> None:
        """Every query also sees the keys and values that `function()` gives, and `tokens` positions lie before the
        first token of a row, which the model's context shrinks by (0: the prefix has no place in the sequence)."""

        def extend(ctx: Context) -> None:
            for layer, pair in function().items():
                earlier = ctx.prefixes.get(layer)
                ctx.prefixes[layer] = pair if earlier is None else _joined(earlier, pair)
            ctx.positions_BT = ctx.positions_BT + tokens

        self.model.context_hooks.append(extend)
        self._undo.append(lambda: self.model.context_hooks.remove(extend))

    def embedding(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """The embedding x_BTD of tokens_BT becomes `function(tokens_BT, x_BTD)`."""
        self._hook(self._part("embed_tokens"), lambda _, inputs, x_BTD: function(inputs[0], x_BTD))

    def hidden(self, function: Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]) -> None:
        """What `model.hidden` returns becomes `function(states, h_BTD)`, states the n_layer + 1 residual streams."""
        states: dict[int, torch.Tensor] = {}
        layers = self._part("layers")

        def keep(index: int, x_BTD: torch.Tensor) -> None:
            states[index] = x_BTD

        def apply(h_BTD: torch.Tensor) -> torch.Tensor:
            given = [states[index] for index in range(len(layers) + 1)]
            states.clear()
            return function(given, h_BTD)

        first = layers[0].register_forward_pre_hook(lambda _, inputs: keep(0, inputs[0]))
        self._undo.append(first.remove)
        for index, layer in enumerate(layers, start=1):
            self._hook(layer, lambda *call, index=index: keep(index, call[-1]))
        self._hook(self._part("norm"), lambda *call: apply(call[-1]))

    def detach(self) -> None:
        """Take the adapter off. The base may be trained again once nothing is attached any more."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.model.adapters.remove(self)
        if self.model.adapters:
            self.model.adapters[0]._frozen += self._frozen
        else:
            for parameter in self._frozen:
                parameter.requires_grad_(True)

    def _hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._undo.append(module.register_forward_hook(hook).remove)

    def _part(self, name: str) -> Any:
        part = getattr(self.model, name, None)
        if part is None:
            raise UserError(f"{type(self.model).__name__} has no `{name}`, so this adapter cannot be attached to it")
        return part


def linears(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Linear]:
    """Path -> linear layer for every layer that a target names: its path or the end of it (`q_proj`, `mlp.up_proj`).

    Raises `UserError` when a target names none: an adapter that is not there looks like one that learns nothing.
    """
    every = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen: dict[str, nn.Linear] = {}
    for target in targets:
        matching = {path: linear for path, linear in every.items() if f".{path}".endswith(f".{target}")}
        if not matching:
            names = sorted({path.rsplit(".", 1)[-1] for path in every})
            raise UserError(f"no linear layer is called {target!r} (have: {', '.join(names)}){closest(target, names)}")
        chosen.update(matching)
    return chosen


def _joined(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = max(len(first[0]), len(second[0]))
    pairs = zip(first, second, strict=True)
    k_BGPE, v_BGPE = (torch.cat([x.expand(batch, -1, -1, -1) for x in pair], dim=2) for pair in pairs)
    return k_BGPE, v_BGPE
