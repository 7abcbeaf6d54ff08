"""What the contracts build their parts with: small specs, passes over one layer, a tiny tokenizer, model and dataset.

B batch, T time (tokens of a pass), S keys, D model width, H query heads, G key/value heads, E and F widths of a head,
P prefix length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from sky_core import slots
from sky_core.component import active_catalog
from sky_core.data.dataset import IGNORE, Batch, Dataset
from sky_core.model.cache import Cache
from sky_core.model.context import Context
from sky_core.model.init import init_weights
from sky_core.model.mask import Mask
from sky_core.model.norm import RMSNorm
from sky_core.slots import AttentionSpec, LayerSpec

if TYPE_CHECKING:
    from sky_core.config import Run
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer

LAYER, LAYERS = 1, 3
"""Parts of a layer are built for the middle one of three, so that a part that forgets its index is noticed."""

TEXT = "the cat sat on the mat and the dog sat on the log; a cat and a dog, a mat and a log. "


def component(slot: str, kind: str, **options: Any) -> Any:
    """The component that a run file would get with `{kind: kind, **options}`."""
    return active_catalog()[slot][kind].model_validate(options)


def dense_kernel(
    q_BHTE: torch.Tensor,
    k_BGSE: torch.Tensor,
    v_BGSF: torch.Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(scale QKᵀ + mask) V written down: the oracle of kernels, and the kernel that layers are tested with."""
    repeats = q_BHTE.shape[1] // k_BGSE.shape[1]
    k_BHSE, v_BHSF = (x.repeat_interleave(repeats, dim=1) for x in (k_BGSE, v_BGSF))
    scores_BHTS = q_BHTE @ k_BHSE.mT * (scale if scale is not None else q_BHTE.shape[-1] ** -0.5)
    if softcap is not None:
        scores_BHTS = softcap * (scores_BHTS / softcap).tanh()
    shape = (q_BHTE.shape[2], k_BGSE.shape[2], q_BHTE.device)
    allowed, bias_BHTS = mask.dense(*shape), mask.bias(*shape)
    scores_BHTS = scores_BHTS if bias_BHTS is None else scores_BHTS + bias_BHTS
    weights_BHTS = scores_BHTS.masked_fill(~allowed, -math.inf).softmax(dim=-1)
    return nn.functional.dropout(weights_BHTS, dropout) @ v_BHSF


def layer_spec(**changes: Any) -> LayerSpec:
    """A layer of width 32 with 4 heads of 8 over 2 key/value heads."""
    return LayerSpec(**(_SPEC | changes))


def attention_spec(position: nn.Module, **changes: Any) -> AttentionSpec:
    """`layer_spec` for an attention layer with that position encoding and the dense kernel."""
    own = {"position": position, "kernel": dense_kernel, "scale": _SPEC["head_dim"] ** -0.5, "qk_norm": None}
    return AttentionSpec(**(_SPEC | own | changes))


_SPEC: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "n_head": 4,
    "n_kv_head": 2,
    "head_dim": 8,
    "layer": LAYER,
    "n_layer": LAYERS,
    "max_length": 32,
    "dropout": 0.0,
    "bias": True,
    "initializer_range": 0.3,
    "norm": partial(RMSNorm, eps=1e-6),
}


def fresh(build: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """What `build` makes, with the weights that a model would start it from, in evaluation mode."""

    def make() -> nn.Module:
        module = build(*arguments)
        init_weights(module, _SPEC["initializer_range"], LAYERS)
        return module

    torch.manual_seed(0)
    return started(make).eval()


def started(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` returns; fails when a parameter or buffer of it was never given a start value.

    torch fills memory that nobody wrote with NaN while it is deterministic.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        module = make()
    finally:
        torch.use_deterministic_algorithms(before)
    for name, tensor in module.state_dict().items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{name} starts from memory that nobody wrote"
    return module


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` in evaluation mode with noise on every parameter: gains of 1 and biases of 0 hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Feed:
    """Feeds one layer of a model: whole sequences when `cached` is false, else piece after piece with its state.

    `slot` is "layers" for attention and "memories" for a memory; `ctx` is the context of the last pass.
    """

    def __init__(self, layer: nn.Module, batch: int, *, cached: bool = True, slot: str = "layers", **options: Any):
        self.layer = layer
        self.batch = batch
        self.options = options
        self.cache: Cache | None = None
        if cached:
            states: dict[str, list[Any]] = {"layers": [None] * LAYERS, "memories": [None] * LAYERS}
            states[slot][LAYER] = layer.new_cache(batch, 32, torch.device("cpu"), torch.float32)
            self.cache = Cache([0] * batch, 32, **states)

    def __call__(self, x_BTD: torch.Tensor, counts: list[int] | None = None, **options: Any) -> torch.Tensor:
        """y_BTD; `counts` are the real tokens of each row where rows are padded on the right."""
        tokens = x_BTD.shape[1]
        self.ctx = context(self.batch, tokens, cache=self.cache, counts=counts, **(self.options | options))
        y_BTD = self.layer(x_BTD, self.ctx)
        if self.cache is not None:
            self.cache.advance(counts or [tokens] * self.batch)
        return y_BTD


def context(
    batch: int,
    tokens: int,
    *,
    counts: list[int] | None = None,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    **options: Any,
) -> Context:
    """The context of a pass over `tokens` tokens of each row; options as for `Context.begin`.

    `counts` are the real tokens of right-padded rows, `prefix` the key/value pairs of the tested layer.
    """
    valid_BT = None if counts is None else torch.arange(tokens) < torch.tensor(counts)[:, None]
    tokens_BT = torch.zeros(batch, tokens, dtype=torch.long)
    ctx = Context.begin(tokens_BT, _SPEC["max_length"], valid_BT=valid_BT, **options)
    ctx.embedding_BTD = noise(batch, tokens, _SPEC["d_model"], seed=7)
    if prefix is not None:
        ctx.prefixes[LAYER] = prefix
    return ctx


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` relative to the largest value (fp32 sums of about a hundred terms stay below 1e-5)."""
    actual, expected = actual.detach(), expected.detach()
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def assert_every_parameter_learns(module: nn.Module, total: torch.Tensor) -> None:
    """After `total.backward()` every trainable parameter has a finite gradient."""
    total.backward()
    bad = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all())
    ]
    assert not bad, f"no finite gradient reaches {bad}"


def assert_compiles(module: nn.Module, *arguments: Any, tolerance: float = 1e-5) -> None:
    """`module` compiles into one graph (no break) that computes what the module computes."""
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert_close(compiled(*arguments), module(*arguments), tolerance)


@contextmanager
def generators_untouched() -> Iterator[None]:
    """Fails when the block draws from a global random generator (torch, Python, numpy)."""
    import random

    import numpy as np

    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    yield
    untouched = states() == before
    assert untouched, "a global random generator was drawn from or seeded"


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict, to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_weights(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Same names, same bits."""
    actual = module.state_dict()
    assert actual.keys() == expected.keys()
    changed = [name for name, tensor in actual.items() if not torch.equal(tensor, expected[name])]
    assert not changed, f"changed: {changed}"


def tiny_tokenizer() -> Tokenizer:
    """Bytes: every text, nothing to learn."""
    return component("tokenizer", "byte").train([])


TINY = {"n_layer": 2, "n_head": 2, "d_model": 16, "max_length": 64}
"""Options of the tiny decoder."""


def tiny_model(vocab_size: int, seed: int = 0, **options: Any) -> LanguageModel:
    """A decoder of two layers of width 16 for sequences up to 64 tokens, seeded, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return component("model", "decoder", **(TINY | options)).build(vocab_size).eval()


def tiny_run(**tables: Any) -> Run:
    """A run of three steps of four sequences of `TinyDataset` with the tiny decoder; `tables` replace its tables."""
    from sky_core.config import run_schema

    train = {"steps": 3, "batch_tokens": 64, "precision": "fp32", "dry_run": False}
    given = {"data": TinyData(), "model": TINY, "train": train, "schedule": "constant", "optimizer": {"lr": 0.01}}
    return run_schema().model_validate(given | tables)


class TinyData(slots.Dataset):
    """A few sentences in memory, as bytes; for tests."""

    kind: ClassVar = "tiny"

    def build(self, seed: int, tokenizer: slots.Tokenizer | None) -> TinyDataset:
        return TinyDataset(tokenizer.train([TEXT]) if tokenizer is not None else tiny_tokenizer(), seed=seed)


class TinyDataset(Dataset):
    """`TEXT` over and over, cut into sequences, shuffled by epoch; the last two sequences are the validation split."""

    def __init__(self, tokenizer: Tokenizer, sequence_length: int = 16, sequences: int = 16, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.seed = seed
        stream = torch.tensor(tokenizer.encode(TEXT * (1 + sequences * sequence_length // len(TEXT))))
        self.rows = stream[: (sequences + 2) * sequence_length].view(-1, sequence_length)

    @property
    def fingerprint(self) -> str:
        return f"tiny-{self.tokenizer.fingerprint}-{len(self)}-{self.sequence_length}-{self.seed}"

    def __len__(self) -> int:
        return len(self.rows) - 2

    def batch(self, start: int, count: int) -> Batch:
        return self._batch([self._order(i // len(self))[i % len(self)] for i in range(start, start + count)])

    def validation(self, batch_size: int) -> Iterator[Batch]:
        for start in range(len(self), len(self.rows), batch_size):
            yield self._batch(list(range(start, min(start + batch_size, len(self.rows)))))

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self), generator=generator).tolist()

    def _batch(self, indices: list[int]) -> Batch:
        tokens_BT = self.rows[indices]
        targets_BT = torch.full_like(tokens_BT, IGNORE)
        targets_BT[:, :-1] = tokens_BT[:, 1:]
        return Batch(tokens_BT, targets_BT)
