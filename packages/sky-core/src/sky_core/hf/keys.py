"""Rules between the names and layouts of tensors in a Hugging Face checkpoint and in our models.

    Rule("layers.{l}.mlp.up_proj.{w}", "transformer.h.{l}.mlp.c_fc.{w}", TRANSPOSED)

A rule names one or several tensors of ours and one of theirs (or one for each expert), and holds a function for each
direction. `{l}` stands for a number, other letters for anything. A plan is made from the model alone, so reading and
writing follow the same list, and what a file must hold (names and shapes) is known before it is opened.

L layers, H heads, E width of a head, D model width, X experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Many = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Layout:
    """How tensors of ours lie in those of a file. `read` takes the file's and gives ours, `write` undoes it.

    With `experts` a name of the file holds `{x}`, which counts the first dimension of our tensor.
    """

    read: Many
    write: Many
    experts: bool = False


def _fuse(tensors: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(list(tensors))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(tensors))


def _interleave(tensors: Sequence[Tensor], heads: int) -> Tensor:
    """Tensors (H E, ...) as one (H 3 E, ...): the rows of q, k and v of a head behind each other."""
    import torch

    return torch.stack([tensor.unflatten(0, (heads, -1)) for tensor in tensors], dim=1).flatten(0, 2)


SAME = Layout(list, list)
"""As it is."""

TRANSPOSED = Layout(lambda file: [file[0].t()], lambda ours: [ours[0].t()])
"""Matrices are kept (in, out), as GPT-2's Conv1D has them."""

FUSED_TRANSPOSED = Layout(lambda file: file[0].t().chunk(3), lambda ours: [_fuse(ours).t()])
"""q, k and v as one matrix, kept (in, out)."""

STACKED = Layout(lambda file: [_stack(file)], lambda ours: list(ours[0]), experts=True)
"""A matrix for each expert."""


def fused_by_head(heads: int) -> Layout:
    """q, k and v as one matrix, head by head (GPT-NeoX)."""
    return Layout(
        lambda file: [part.flatten(0, 1) for part in file[0].unflatten(0, (heads, 3, -1)).unbind(1)],
        lambda ours: [_interleave(ours, heads)],
    )


@dataclass(frozen=True)
class Rule:
    """`ours` may be several names, separated by spaces."""

    ours: str
    theirs: str
    layout: Layout = SAME


@dataclass(frozen=True)
class Group:
    """Tensors that belong together: `ours` in the model, `theirs` in a file (with their shapes)."""

    ours: list[str]
    theirs: dict[str, tuple[int, ...]]
    layout: Layout


def plan(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> list[Group]:
    """Every tensor of a model in one group, by the first rule that has its name. Raises `KeyError` for one without."""
    import torch

    rules = list(rules)
    patterns = [(rule, [_pattern(name) for name in rule.ours.split()]) for rule in rules]
    groups: list[Group] = []
    done: set[str] = set()
    for name in state:
        if name in done:
            continue
        rule, found = next(
            ((rule, found) for rule, names in patterns for one in names if (found := one.fullmatch(name))), (None, None)
        )
        if rule is None or found is None:
            raise KeyError(name)
        ours = [one.format(**found.groupdict()) for one in rule.ours.split()]
        blank = [torch.empty(state[one].shape, device="meta") for one in ours]
        number = len(blank[0]) if rule.layout.experts else 1
        theirs = [rule.theirs.format(**found.groupdict(), x=x) for x in range(number)]
        shapes = [tuple(tensor.shape) for tensor in rule.layout.write(blank)]
        groups.append(Group(ours, dict(zip(theirs, shapes, strict=True)), rule.layout))
        done.update(ours)
    return groups


def _pattern(name: str) -> re.Pattern[str]:
    """The names that a template stands for."""
    escaped = re.escape(name).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"{(\w)}", lambda m: rf"(?P<{m[1]}>{r'[0-9]+' if m[1] == 'l' else '.+'})", escaped))
