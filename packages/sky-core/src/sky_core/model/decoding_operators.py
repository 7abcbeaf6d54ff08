"""What takes the place of torch's products and attention in a step of decoding on a CPU (`sky_core.native`).

Two passes over the step. While it is traced, `FewRows` puts operators of ours where torch's would prepare for many
rows. In the graph that comes of it, `Join` makes one call of products that multiply the same rows (queries, keys and
values; gate and up): 57 in place of 99 for 14 layers, each of them a longer run through memory.

M rows of an input, K and N input and output features; of attention as in `kernels.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from sky_core import native

NUMBERS = (torch.float32, torch.bfloat16)
"""What the native operators compute with."""


class FewRows(TorchFunctionMode):
    """Products and attention of few rows by the operators of `sky_core.native`, where these take them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:  # whose Python torch cannot trace below a mode
            return torch.unflatten(*args, **kwargs)
        y = INSTEAD[func](*args, **kwargs) if func in INSTEAD else None
        return func(*args, **kwargs) if y is None else y


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    rows = math.prod(input.shape[:-1])
    plain = weight.dim() == 2 and weight.is_contiguous() and input.dtype == weight.dtype in NUMBERS
    if not plain or not 1 <= rows <= native.MOST_ROWS:
        return None
    y = torch.ops.sky.few_rows(input, [weight], [])
    return y if bias is None else y + bias


def _int8(x_MK: torch.Tensor, weight_NK: torch.Tensor, scales_N: torch.Tensor) -> torch.Tensor | None:
    return torch.ops.sky.few_rows(x_MK, [weight_NK], [scales_N]) if len(x_MK) <= native.int8_rows else None


def _int4(x_MK: torch.Tensor, codes: torch.Tensor, group: int, scales_gN2: torch.Tensor) -> torch.Tensor | None:
    if not native.has_int4 or len(x_MK) > native.MOST_ROWS or len(codes) % native.PANEL:
        return None
    return torch.ops.sky.few_rows_int4(x_MK, [codes], [scales_gN2], group)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    if attn_mask is None or dropout_p or is_causal or enable_gqa:
        return None
    numbers = attn_mask.is_floating_point() and query.dtype == key.dtype == value.dtype in NUMBERS
    alike = query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    together = key.stride(-1) == value.stride(-1) == attn_mask.stride(-1) == 1 and attn_mask.shape[-1] == key.shape[-2]
    widths = query.shape[-1] % native.STEP == value.shape[-1] % native.STEP == 0
    if not (numbers and alike and together and widths):
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.sky.few_queries(query, key, value, attn_mask, scale)


INSTEAD: dict[Any, Callable[..., torch.Tensor | None]] = {
    F.linear: _linear,
    torch.ops.aten._weight_int8pack_mm: _int8,
    torch.ops.aten._weight_int4pack_mm_for_cpu: _int4,
    F.scaled_dot_product_attention: _attention,
}
"""What computes the same as a function of torch and has its parameters; gives None where it does not take them."""


JOINED = ("sky.few_rows.default", "sky.few_rows_int4.default")


class Join(CustomGraphPass):
    """Products of few rows by several matrices of the graph's inputs, as one call with all of the matrices."""

    def __call__(self, graph: Graph) -> None:
        groups: dict[Any, list[Node]] = {}
        for node in graph.nodes:
            if str(node.target) in JOINED and all(w.op == "placeholder" for tensors in node.args[1:3] for w in tensors):
                x, first = node.args[0], node.args[1][0].meta["val"]
                alike = (
                    node.target,
                    _viewed(x),
                    tuple(x.meta["val"].shape),
                    first.dtype,
                    bool(node.args[2]),
                    node.args[3:],
                )
                groups.setdefault(alike, []).append(node)
        for nodes in groups.values():
            if len(nodes) > 1:
                _join(graph, nodes)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _viewed(x: Node) -> Node:
    """What a node is a view of: the layers each reshape what enters them."""
    while x.target in (torch.ops.aten.view.default, torch.ops.aten.reshape.default):
        x = x.args[0]
    return x


def _join(graph: Graph, nodes: list[Node]) -> None:
    one = nodes[0]
    tensors = [[tensor for node in nodes for tensor in node.args[i]] for i in (1, 2)]
    with graph.inserting_before(one):
        y = graph.call_function(one.target, (one.args[0], *tensors, *one.args[3:]))
        shape, start = one.meta["val"].shape, 0
        y.meta["val"] = one.meta["val"].new_empty(*shape[:-1], sum(node.meta["val"].shape[-1] for node in nodes))
        for node in nodes:
            end = start + node.meta["val"].shape[-1]
            part = graph.call_function(torch.ops.aten.slice.Tensor, (y, len(shape) - 1, start, end))
            part.meta["val"] = y.meta["val"][..., start:end]
            node.replace_all_uses_with(part)
            start = end
    for node in nodes:
        graph.erase_node(node)
