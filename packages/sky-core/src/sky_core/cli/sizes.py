"""What a model amounts to: parameters, FLOPs, cache and memory, counted on a model that holds no weights.

    tokens = 20 N       (about what Hoffmann et al. 2022, arXiv:2203.15556, table 3, find best for a given compute; of a
                         mixture of experts N counts what a token passes)
    memory = weights + gradients + the optimizer's state + bf16 copies under autocast, as each engine holds them

Torch is imported where something is counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from sky_core.cli.quiet import quiet
from sky_core.component import active_catalog
from sky_core.config import Preset, Run

if TYPE_CHECKING:
    from torch import nn

    from sky_core.model.language_model import LanguageModel
    from sky_core.slots import Engine, Optimizer

TOKENS_PER_PARAMETER = 20
PROCESSES = (1, 8)
"""On how many processes the memory of training is counted."""


def measure(run: Run | Preset, rows: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """What the model and data of a run or preset amount to; the model is built without memory for its weights.

    Fills in the `parameters` of the rows: all of the model's, and of each part what no part inside of it holds.
    """
    import torch

    from sky_core.model.count import idle_parameters

    if isinstance(run, Preset):
        dataset, vocab_size = None, run.vocab_size
    else:
        dataset = run.data.build(run.seed, run.tokenizer)
        vocab_size = dataset.tokenizer.vocab_size
    with torch.device("meta"):
        model = run.model.build(vocab_size)
    _count_parts(model, rows)
    count = model.n_parameters()
    active = count["total"] - idle_parameters(model)
    length = dataset.sequence_length if dataset is not None else model.max_length
    flops, tokens = model.flops_per_token(length), TOKENS_PER_PARAMETER * active
    sizes = {
        **{f"parameters.{name}": number for name, number in count.items()},
        "parameters.active": active,
        "vocabulary": vocab_size,
        "sequence_length": length,
        "flops_per_token": flops,
        **_cache(model),
        "weights_bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        **_training(run, model),
        "tokens_for_20_per_parameter": tokens,
        "flops_for_20_per_parameter": flops * tokens,
    }
    if dataset is not None:
        own = dataset.tokenizer
        sizes["tokenizer"] = {"kind": own.kind, "fingerprint": own.fingerprint}
        sizes |= {f"data.{name}": value for name, value in dataset.describe().items()}
    return sizes


def _count_parts(model: LanguageModel, rows: Sequence[dict[str, Any]]) -> None:
    """Fill in the `parameters` of the rows."""
    parts = [row for row in rows if row["path"].startswith("model.")]
    counts = _parameters_by_class(model, {row["class"] for row in parts})
    for row in parts:
        same = [other for other in parts if other["class"] == row["class"]]
        # Tiled over the depth, parts of one class take turns.
        modules = counts.get(row["class"], [])[next(i for i, one in enumerate(same) if one is row) :: len(same)]
        row["parameters"] = sum(modules) if modules else None
    for row in rows:
        if row["path"] == "model":
            row["parameters"] = model.n_parameters()["total"]


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _parameters_by_class(model: nn.Module, classes: set[str]) -> dict[str, list[int]]:
    """Class -> how many parameters each of its modules holds, in order; one counts for the innermost around it."""
    counts: dict[str, list[int]] = {name: [] for name in classes}
    seen = set()

    def walk(module: nn.Module, owner: list[int], index: int) -> None:
        if (name := _name(module)) in counts:
            owner, index = counts[name], len(counts[name])
            owner.append(0)
        for parameter in module.parameters(recurse=False):
            owner[index] += 0 if parameter in seen else parameter.numel()
            seen.add(parameter)
        for child in module.children():
            if child not in seen:
                seen.add(child)
                walk(child, owner, index)

    walk(model, [0], 0)
    return counts


def _cache(model: LanguageModel) -> dict[str, dict[str, int]]:
    """Bytes of the layers' states by dtype: of one token, of the whole context, and what windows leave seen of that."""
    import torch

    length, stateful, sizes = model.max_length, list(_stateful(model)), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        states = [module.new_cache(1, length, torch.device("meta"), dtype) for module in stateful]
        held = [sum(tensor.nbytes for tensor in state.tensors().values()) for state in states]
        windows = [min(getattr(module, "window", None) or length, length) for module in stateful]
        seen = sum(size * window // length for size, window in zip(held, windows, strict=True))
        sizes[name] = (sum(held) // length, sum(held), seen)
    keys = ("cache_bytes_per_token", "cache_bytes_of_context", "cache_bytes_in_windows")
    return {key: {name: numbers[i] for name, numbers in sizes.items()} for i, key in enumerate(keys)}


def _stateful(module: nn.Module) -> Iterator[Any]:
    """The attention layers and memories below `module`: the outermost that have a state of their own."""
    for child in module.children():
        if hasattr(child, "new_cache"):
            yield child
        else:
            yield from _stateful(child)


def _training(run: Run | Preset, model: LanguageModel) -> dict[str, Any]:
    """Bytes of the optimizer's state, and of training by engine, precision and number of processes; neither where
    adapters leave most of the model untrained, nor where the optimizer's state is not known before it runs."""
    state = None if isinstance(run, Run) and run.adapters else _optimizer_bytes(run.optimizer, model)
    if state is None:
        return {"optimizer_bytes": None, "bytes_to_train": []}
    count, table = model.n_parameters(), []
    average = 4 * count["total"] if isinstance(run, Run) and getattr(run.train, "ema", None) else 0
    for engine in _engines(run):
        for precision in ("fp32", "bf16"):
            held = {number: engine.memory(count, state, precision, number) + average for number in PROCESSES}
            table += [
                {"engine": engine.kind, "precision": precision, "processes": number, "bytes": size}
                for number, size in held.items()
                if number == PROCESSES[0] or size != held[PROCESSES[0]]
            ]
    return {"optimizer_bytes": state, "bytes_to_train": table}


def _engines(run: Run | Preset) -> Iterator[Engine]:
    """The run's own engine, then all that are offered and need no options."""
    own = getattr(run.train, "engine", None) if isinstance(run, Run) else None
    if own is not None:
        yield own
    for kind, engine in active_catalog()["engine"].items():
        if own is None or kind != own.kind:
            try:
                yield cast("Engine", engine())
            except ValidationError:
                continue  # it has options that only a run file can choose


def _optimizer_bytes(optimizer: Optimizer, model: LanguageModel) -> int | None:
    """Bytes of state after one step without numbers; None where the step asks for numbers."""
    import torch

    named = [(f"model.{name}", parameter) for name, parameter in model.named_parameters()]
    for _, parameter in named:
        parameter.grad = torch.empty_like(parameter)
    try:
        with quiet("sky_core.training"):
            built = optimizer.build(named)
            for one in built:
                one.step()
    except RuntimeError:
        return None
    values = [value for one in built for state in one.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor) and value.ndim)


# -------------------------------------------------------------------------------------------------------------- text


def facts(sizes: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, line) for each size of the model and fact of its data, for people; no label: as the line before."""
    from sky_core.training.progress import memory, quantity

    count = {name: quantity(sizes[f"parameters.{name}"]) for name in ("total", "body", "embedding", "active")}
    yield "parameters", f"{count['total']} ({count['body']} body, {count['embedding']} embedding)"
    if sizes["parameters.active"] < sizes["parameters.total"]:
        yield "", f"{count['active']} of them active for a token"
    yield "FLOPs", f"{quantity(sizes['flops_per_token'])} per token of training, {sizes['sequence_length']} at a time"
    tokens, flops = (quantity(sizes[f"{name}_for_20_per_parameter"]) for name in ("tokens", "flops"))
    yield "tokens", f"{tokens} for {TOKENS_PER_PARAMETER} per parameter: {flops} FLOPs of training"
    token, context, seen = (sizes[f"cache_bytes_{of}"] for of in ("per_token", "of_context", "in_windows"))
    yield "KV cache", f"{memory(token['fp32'])} per token in fp32, {memory(token['bf16'])} in bf16"
    inside = f", {memory(seen['bf16'])} of it inside the windows" if seen["bf16"] < context["bf16"] else ""
    yield "", f"{memory(context['bf16'])} for the whole context in bf16{inside}"
    yield "weights", f"{memory(sizes['weights_bytes'])} as a file in fp32, {memory(sizes['weights_bytes'] / 2)} in bf16"
    yield from _memory(sizes)
    yield from _described("data", {key[5:]: value for key, value in sizes.items() if key.startswith("data.")})


def _memory(sizes: dict[str, Any]) -> Iterator[tuple[str, str]]:
    from sky_core.training.progress import memory

    if sizes["optimizer_bytes"] is None:
        yield "memory", "to train: not known before it runs (adapters, or an optimizer that needs numbers)"
        return
    label = "memory"
    for engine in dict.fromkeys(row["engine"] for row in sizes["bytes_to_train"]):
        rows = [row for row in sizes["bytes_to_train"] if row["engine"] == engine]
        for number in dict.fromkeys(row["processes"] for row in rows):
            held = [f"{memory(row['bytes'])} in {row['precision']}" for row in rows if row["processes"] == number]
            yield label, f"{engine}: {', '.join(held)} to train" + (f" on each of {number}" if number > 1 else "")
            label = ""
    state = memory(sizes["optimizer_bytes"])
    yield "", f"(weights, gradients and {state} of the optimizer's state; activations on top)"


def _described(label: str, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A line for the plain facts of a dataset, then those of each table inside."""
    from sky_core.training.progress import quantity

    def fact(name: str, value: Any) -> str:
        if isinstance(value, bool | str):
            return f"{name} {value_text(value)}"
        return f"{quantity(value)} {name}" if isinstance(value, int) else f"{name} {value:.3g}"

    plain = [fact(name, value) for name, value in facts.items() if isinstance(value, int | float | str)]
    if plain:
        yield label, ", ".join(plain)
    for name, value in facts.items():
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, dict):
                yield from _described(f"{label}.{index if isinstance(value, list) else name}", item)


def value_text(value: Any) -> str:
    """As a run file would have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
