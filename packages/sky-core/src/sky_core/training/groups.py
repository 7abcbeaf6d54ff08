"""Which parameter belongs to which group of an optimizer.

Two rules, by shape and name:
- decay: weight decay shrinks tensors of two or more dimensions; vectors (gains, biases) are never decayed. Embeddings
  are matrices, so they are decayed unless asked otherwise.
- hidden matrices: two dimensions, and neither an embedding nor a head; or three where a module called `experts` stacks
  the matrices of its experts. Muon orthogonalises exactly these, each expert's by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from sky_core.errors import ConfigError, SkyError

Named = tuple[str, nn.Parameter]

EMBEDDING_OR_HEAD = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|\w*head)\.")
"""A module on the path is an embedding (`embed_tokens`, `position_embedding`, `wte`, `wpe`) or a head (`lm_head`)."""


def trainable(named_parameters: Iterable[Named]) -> list[Named]:
    """The parameters that require a gradient, each once, each with a name.

    Raises `SkyError` for a parameter without a name or under two names, and for a name used twice.
    """
    names: set[str] = set()
    seen: dict[int, str] = {}
    kept: list[Named] = []
    for name, parameter in named_parameters:
        if not name:
            raise SkyError(f"a parameter of shape {tuple(parameter.shape)} has no name: give named_parameters()")
        if name in names:
            raise SkyError(f"two parameters are called {name!r}: names must be unique")
        if id(parameter) in seen:
            raise SkyError(f"one parameter has two names, {seen[id(parameter)]!r} and {name!r}: list it once")
        names.add(name)
        seen[id(parameter)] = name
        if parameter.requires_grad:
            kept.append((name, parameter))
    if not kept:
        raise SkyError("nothing to optimize: no parameter requires a gradient")
    return kept


def is_embedding_or_head(name: str) -> bool:
    """Whether a parameter, by its name, is a table indexed by tokens or positions, or the head over the vocabulary."""
    return EMBEDDING_OR_HEAD.search(name) is not None


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon's geometry fits: a matrix that maps hidden states to hidden states, or a stack of experts'."""
    stacked = parameter.ndim == 3 and "experts" in name.split(".")
    return (parameter.ndim == 2 or stacked) and not is_embedding_or_head(name)


def matching(patterns: Sequence[str], names: Iterable[str], key: str) -> set[str]:
    """The names matched by shell-style patterns. `ConfigError` for a pattern, given under `key`, that matches none."""
    names = list(names)
    matched: set[str] = set()
    problems = []
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            problems.append(f"{key}: {pattern!r} matches no trainable parameter (they are called like {names[0]!r})")
        matched |= hits
    if problems:
        raise ConfigError(problems)
    return matched


def decay_groups(
    parameters: Sequence[Named], weight_decay: float, *, decay_embeddings: bool, no_decay: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """One group with `weight_decay`, one without; a group without members is left out. `no_decay` holds names."""
    exempt = set(no_decay)
    decayed: list[Named] = []
    others: list[Named] = []
    for name, parameter in parameters:
        skip = parameter.ndim < 2 or name in exempt or (is_embedding_or_head(name) and not decay_embeddings)
        (others if skip else decayed).append((name, parameter))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def scale_groups(groups: list[dict[str, Any]], lr: float, lr_scale: Mapping[str, float]) -> list[dict[str, Any]]:
    """`groups` split so that each has one learning rate: `lr` times the factor of its members' names.

    What a step decays, rate times decay, stays what it was (Wortsman et al. 2023, arXiv:2309.14322, section 3.2.2:
    decay that does not follow the rate is what transfers across widths).
    """
    split = []
    for group in groups:
        by_factor: dict[float, list[Named]] = {}
        for name, parameter in group["params"]:
            by_factor.setdefault(lr_scale.get(name, 1.0), []).append((name, parameter))
        split += [
            {**group, "params": members, "lr": lr * factor, "weight_decay": group["weight_decay"] / factor}
            for factor, members in by_factor.items()
        ]
    return split


def describe(parameters: Sequence[Named]) -> str:
    """`24 tensors, 3,145,728 elements`."""
    return f"{len(parameters)} tensors, {sum(parameter.numel() for _, parameter in parameters):,} elements"
