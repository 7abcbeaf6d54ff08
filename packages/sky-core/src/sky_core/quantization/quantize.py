"""Put quantised linear layers in the place of a model's own, by their names."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import partial

import torch
from torch import nn

from sky_core.component import closest
from sky_core.errors import UserError
from sky_core.quantization.int4 import Int4Linear
from sky_core.quantization.int8 import Int8Linear
from sky_core.quantization.linear import QuantizedLinear

log = logging.getLogger(__name__)

FORMATS = ("int8", "int4")


def quantize_(
    model: nn.Module, kind: str, *, group: int = 32, head: bool = True, exclude: Collection[str] = ()
) -> None:
    """Replace every `nn.Linear` of `model` by its quantised layer, in place; names stay, and parameters are frozen.

    `kind` is "int8" (one scale for each output feature) or "int4" (one for every `group` input features). A head tied
    to the embedding gets a quantised matrix of its own (`lm_head`), and the embedding stays what it was; `head=False`
    leaves the head alone. `exclude` names layers to leave by their path or its end (`mlp.down_proj`). Subclasses of
    `nn.Linear`, embeddings and the stacked matrices of experts stay exact; the log says so, and which layers torch's
    packed kernels serve.

    Raises `UserError` for an unknown format, a group that does not fit, a name in `exclude` that no layer has, weights
    that are not finite, and a model that has adapters attached or is quantised already.
    """
    make = _format(kind, group)
    if getattr(model, "adapters", None):
        raise UserError(f"{kind}: an adapter is attached to the model; quantise the model first, or take it off")
    modules = dict(model.named_modules(remove_duplicate=False))
    if any(isinstance(module, QuantizedLinear) for module in modules.values()):
        raise UserError(f"{kind}: the model is quantised already; load it again to quantise it in another way")
    tied = getattr(model, "lm_head", model) is None
    linears = {path: module for path, module in modules.items() if type(module) is nn.Linear}
    if tied:
        linears["lm_head"] = _tied_head(modules["embed_tokens"])
    left = _excluded(linears, [*exclude, *([] if head else ["lm_head"])])
    chosen = {path: linear for path, linear in linears.items() if path not in left}
    for path, linear in chosen.items():
        _check(kind, path, linear, group)

    made: dict[int, QuantizedLinear] = {}
    for path, linear in chosen.items():
        if id(linear) not in made:
            made[id(linear)] = make(linear).train(linear.training)
        parent, _, name = path.rpartition(".")
        setattr(modules[parent], name, made[id(linear)])
    model.requires_grad_(False)
    _tell(kind, [linears[path] for path in chosen], list(made.values()), model)


def _format(kind: str, group: int) -> Callable[[nn.Linear], QuantizedLinear]:
    if kind == "int8":
        return Int8Linear
    if kind == "int4":
        if group < 2 or group % 2:
            raise UserError(f"int4: groups of {group}; give an even number of input features, as 32")
        return partial(Int4Linear, group=group)
    raise UserError(f"no format of weights is called {kind!r} (have: {', '.join(FORMATS)}){closest(kind, FORMATS)}")


def _tied_head(embedding: nn.Module) -> nn.Linear:
    """The linear layer that a tied head is; it shares the embedding's matrix."""
    weight_VD = embedding.get_parameter("weight")
    linear = nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=False, device="meta")
    linear.weight = weight_VD
    return linear.train(embedding.training)


def _excluded(paths: Collection[str], names: Iterable[str]) -> set[str]:
    left: set[str] = set()
    for name in names:
        matching = {path for path in paths if f".{path}".endswith(f".{name}")}
        if not matching:
            have = sorted({path.rsplit(".", 1)[-1] for path in paths})
            raise UserError(f"no linear layer is called {name!r} (have: {', '.join(have)}){closest(name, have)}")
        left |= matching
    return left


def _check(kind: str, path: str, linear: nn.Linear, group: int) -> None:
    if kind == "int4" and linear.in_features % group:
        raise UserError(
            f"int4: {path} has {linear.in_features} input features, no multiple of the group of {group};"
            " give another group, or leave the layer out (exclude)"
        )
    if not torch.isfinite(linear.weight).all():
        raise UserError(f"{kind}: the weight of {path} is not finite; it cannot be quantised")


def _tell(kind: str, linears: list[nn.Linear], made: list[QuantizedLinear], model: nn.Module) -> None:
    before = sum(linear.weight.nbytes for linear in {id(linear): linear for linear in linears}.values())
    after = sum(layer.codes.nbytes + layer.scales.nbytes for layer in made)
    log.info("%s: %d linear layers, %.1f MB of weights in %.1f MB", kind, len(made), before / 1e6, after / 1e6)
    ways: Counter[str] = Counter()
    for layer in made:
        if layer.codes.device.type != "cpu":
            ways[f"dequantised for every product: no packed kernel on {layer.codes.device.type}"] += 1
        elif layer.obstacle is not None:
            ways[f"dequantised for every product: {layer.obstacle}"] += 1
        else:
            ways[f"torch's packed kernel up to {layer.few_rows} rows, dequantised products above"] += 1
    for way, count in ways.items():
        log.info("%s: %d layers: %s", kind, count, way)
    exact = Counter(_kinds_left(model))
    if exact:
        log.info("%s: left exact: %s", kind, ", ".join(f"{count} {name}" for name, count in exact.items()))


def _kinds_left(model: nn.Module) -> Iterable[str]:
    """The name of each module that still holds matrices of its own."""
    for module in model.modules():
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            yield type(module).__name__.lstrip("_")
