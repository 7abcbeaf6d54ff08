"""What our optimizers share: they start without torch's compiler, and update the parameters of a group together."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer that is never compiled.

    torch wraps methods of its optimizers for those that are, and the wrappers import its compiler when they are first
    called, which takes most of the time that torch itself takes. Here the methods are what is inside the wrappers.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class ForeachOptimizer(EagerOptimizer):
    """An optimizer whose step is one `update` for each group of parameters."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self.update(group, parameters)

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        """Change `parameters` (at least one, all with a gradient), by the options of their `group`."""
        raise NotImplementedError
