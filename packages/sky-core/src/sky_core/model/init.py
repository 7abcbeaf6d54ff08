"""Initialisation in one place (Radford et al. 2019, GPT-2, section 2.3).

    weights of linear layers and embeddings    N(0, std²), std = initializer_range; likewise each of the matrices that
                                               a module called `experts` holds as stacks
    of those, o_proj and down_proj             N(0, (std / sqrt(2 n_layer))²): each layer adds to the residual stream
                                               twice, so its variance stays that of one addition;
                                               or 0 (`zero_residual`): the model starts as its embedding and head alone
                                               (Goyal et al. 2017, arXiv:1706.02677, section 5.1; modded-nanoGPT)
    biases of linear layers                    0
    everything else (norms, gates, ...)        as its module was built: norms have weight 1 and bias 0

Under muP (`sky_core.model.mup`) the std of linear layers other than the head is divided by sqrt(width / base width).

A module whose linear layers need something else has a method `init_weights()`, which is then all that is done to it
and what it holds. Weights depend on torch's global generator only: the same `torch.manual_seed` gives the same model.
"""

from __future__ import annotations

from torch import nn

RESIDUAL = ("o_proj", "down_proj")
"""Names of the projections that write to the residual stream."""


def init_weights(
    module: nn.Module,
    std: float,
    n_layer: int,
    *,
    width_ratio: float = 1.0,
    zero_residual: bool = False,
    name: str = "",
) -> None:
    """Initialise `module`, called `name` by its parent, and everything below it, in place."""
    own = getattr(module, "init_weights", None)
    if own is not None:
        own()
        return
    matrices: dict[str, nn.Parameter] = {}
    if isinstance(module, nn.Linear | nn.Embedding):
        matrices = {name: module.weight}
    elif name == "experts":
        matrices = dict(module.named_parameters(recurse=False))
    for matrix_name, weight in matrices.items():
        scale = std if isinstance(module, nn.Embedding) or name == "lm_head" else std / width_ratio**0.5
        if matrix_name in RESIDUAL:
            scale = 0.0 if zero_residual else scale / (2 * n_layer) ** 0.5
        nn.init.normal_(weight, std=scale)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    for child_name, child in module.named_children():
        init_weights(child, std, n_layer, width_ratio=width_ratio, zero_residual=zero_residual, name=child_name)
