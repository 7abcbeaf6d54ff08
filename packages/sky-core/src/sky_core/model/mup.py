"""muP: hyper-parameters tuned at one width serve at every width (Yang et al. 2022, arXiv:2203.03466, table 8).

With m = d_model / base_d_model, relative to the standard parametrisation at the base width:

                          initial std    forward             Adam's learning rate
    embeddings            1              1                   1
    hidden matrices       1 / sqrt(m)    1                   1 / m
    head                  1              logits x 1 / m      1
    vectors               1              1                   1
    attention scores      -              sqrt(d_b) / d_h     -         instead of 1 / sqrt(d_h)

d_h is the width of a head, d_b that of the base model's; where heads keep their width (more of them in a wider model)
nothing changes. At the base width all of it is the standard parametrisation. Every update then changes hidden states
and logits by an amount that does not depend on the width: the coordinate check in the tests sees that it is flat.

Of the paper's equivalent forms this is the one that also serves a head tied to the embedding: the head keeps its
initial std and its rate, and its output is multiplied. Where we differ: weight decay does not follow the rate
(`sky_core.training.groups.scale_groups`). Muon's step is orthogonal, so its effect does not grow with the width, and
only what AdamW trains takes the factors.
"""

from __future__ import annotations

from torch import nn


def lr_scale(model: nn.Module, width_ratio: float) -> dict[str, float]:
    """Name -> factor of Adam's learning rate for the hidden matrices: all of two or more dimensions, and neither tables
    of an embedding nor the head."""
    spared = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name == "lm_head"
    }
    return {
        name: 1 / width_ratio
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in spared
    }


def attention_scale(head_dim: int, base_head_dim: int) -> float:
    """What scores are multiplied with: sqrt(base_head_dim) / head_dim."""
    return base_head_dim**0.5 / head_dim
