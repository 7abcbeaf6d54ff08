"""What our optimizers share: the parameters of a group are updated together, in batched tensor operations."""

from __future__ import annotations

from typing import Any

import torch


class ForeachOptimizer(torch.optim.Optimizer):
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
