"""The slots: one base class per kind of part, with what its `build` is given and must return.

A component fills a slot by subclassing its base class and is offered through the hook named there. The contract of
every slot is executable: `sky_core.testing` has one test class per base class below.

Nothing here imports torch; the types that do are imported for the type checker only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from sky_core.component import Component

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from sky_core.config import Run
    from sky_core.data.dataset import Dataset as BuiltDataset
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer as BuiltTokenizer
    from sky_core.training.engine import Engine as BuiltEngine
    from sky_core.training.objective import Objective as BuiltObjective
    from sky_core.training.trainer import Trainer as BuiltTrainer


NO_SCALE: Mapping[str, float] = MappingProxyType({})
"""Every parameter learns at the optimizer's own rate."""


@dataclass(frozen=True)
class LayerSpec:
    """What a part of one layer may know about the model it is built for.

    `norm` builds a normalisation of a given width; `initializer_range` is the standard deviation of weights; `layer`
    counts from 0, the modules of multi-token prediction from `n_layer`.
    """

    vocab_size: int
    d_model: int
    n_head: int
    n_kv_head: int
    head_dim: int
    layer: int
    n_layer: int
    max_length: int
    dropout: float
    bias: bool
    initializer_range: float
    norm: Callable[[int], nn.Module]


@dataclass(frozen=True)
class AttentionSpec(LayerSpec):
    """`LayerSpec` plus what attention layers share: the position encoding, the kernel, the scale of scores, and norms
    of q and k.

    `qk_norm` is None (no norm), "head" (one norm of width head_dim for every head) or "full" (over all heads).
    """

    position: nn.Module
    kernel: Callable[..., torch.Tensor]
    scale: float
    qk_norm: str | None


class Model(Component):
    """A whole architecture. Offered through `sky_models`.

    `build(vocab_size)` returns a `sky_core.model.language_model.LanguageModel` with its weights initialised from
    torch's global generator.
    """

    slot: ClassVar = "model"

    @abstractmethod
    def build(self, vocab_size: int) -> LanguageModel: ...


class Block(Component):
    """The residual wiring of one layer. Offered through `sky_blocks`.

    `build(spec, attention, feedforward, memory)` returns a module with `forward(x_BTD, ctx) -> y_BTD`; `memory` is
    None where the layer has none. `final_norm` says whether the stack needs a norm after its last block.
    """

    slot: ClassVar = "block"
    final_norm: ClassVar[bool] = True

    @abstractmethod
    def build(
        self, spec: LayerSpec, attention: nn.Module, feedforward: nn.Module, memory: nn.Module | None
    ) -> nn.Module: ...


class Attention(Component):
    """An attention layer: it owns projections, positions and its cache. Offered through `sky_attention`.

    `build(spec)` returns a module with `forward(x_BTD, ctx) -> y_BTD` and
    `new_cache(batch, max_length, device, dtype) -> sky_core.model.cache.LayerCache`.
    """

    slot: ClassVar = "attention"

    @abstractmethod
    def build(self, spec: AttentionSpec) -> nn.Module: ...


class Kernel(Component):
    """Computes softmax(QKᵀ)V under a declarative mask. Offered through `sky_kernels`.

    `build()` returns a callable `(q_BHTE, k_BGSE, v_BGSF, mask, *, scale, dropout, softcap=None) -> y_BHTF`, H a
    multiple of G. With `softcap` c the scores are c tanh(scores / c); a kernel without it raises `UserError`.
    """

    slot: ClassVar = "kernel"

    @abstractmethod
    def build(self) -> Callable[..., torch.Tensor]: ...


class FeedForward(Component):
    """The position-wise part of a layer. Offered through `sky_feedforwards`.

    `build(spec)` returns a module with `forward(x_BTD, ctx) -> y_BTD`; extra losses go through `ctx.add_loss`. A module
    may have `after_step(sum, *, skipped) -> dict[str, Tensor]`, called after each optimizer step with a sum over all
    processes, and `idle_parameters`, the number of its parameters that a token does not pass.
    """

    slot: ClassVar = "feedforward"

    @abstractmethod
    def build(self, spec: LayerSpec) -> nn.Module: ...


class Position(Component):
    """How a model knows the order of tokens. Offered through `sky_positions`.

    `build(d_model, head_dim, max_length, n_head)` returns a `sky_core.model.position.PositionEncoding`.
    """

    slot: ClassVar = "position"

    @abstractmethod
    def build(self, d_model: int, head_dim: int, max_length: int, n_head: int) -> nn.Module: ...


class Norm(Component):
    """A normalisation over the last dimension. Offered through `sky_norms`. `build(dim)` returns the module."""

    slot: ClassVar = "norm"

    @abstractmethod
    def build(self, dim: int) -> nn.Module: ...


class Memory(Component):
    """A memory beside attention with explicit state. Offered through `sky_memories`.

    `build(spec)` returns a module with `forward(x_BTD, ctx) -> y_BTD` (added to the residual stream; zero while the
    memory is empty and untrained) and `new_cache(...)` as an attention layer has. The layer reads and writes its
    state as `ctx.memory_cache(layer)`.
    """

    slot: ClassVar = "memory"

    @abstractmethod
    def build(self, spec: LayerSpec) -> nn.Module: ...


class Adapter(Component):
    """A change to a built model that lives outside it. Offered through `sky_adapters`.

    `build(model)` returns a `sky_core.model.adapter.Attached`: the base frozen, the adapter's own parameters
    trainable, nothing changed in the model's output until they are trained, and `detach()` to take it off again.
    """

    slot: ClassVar = "adapter"

    @abstractmethod
    def build(self, model: LanguageModel) -> Any: ...


class Tokenizer(Component):
    """Text to token ids and back. Offered through `sky_tokenizers`.

    `train(texts)` makes a tokenizer from an iterable of documents; `load(folder)` reads a saved one. Both return a
    `sky_core.tokenizer.base.Tokenizer`. Kinds with nothing to learn ignore the texts.
    """

    slot: ClassVar = "tokenizer"

    @abstractmethod
    def train(self, texts: Any) -> BuiltTokenizer: ...

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> BuiltTokenizer: ...


class Dataset(Component):
    """Where training and validation sequences come from. Offered through `sky_datasets`.

    `build(seed, tokenizer)` returns a `sky_core.data.dataset.Dataset`. `tokenizer` is the run file's `tokenizer:`
    component, or None when the run file leaves it to the data. `tokenizes` says whether `build` makes ids of text
    itself: a run that starts from another one (`init:`) then has the tokenizer of that one.
    """

    slot: ClassVar = "dataset"
    tokenizes: ClassVar[bool] = False

    @abstractmethod
    def build(self, seed: int, tokenizer: Tokenizer | None) -> BuiltDataset: ...


class Objective(Component):
    """A loss from (model, batch). Offered through `sky_objectives`.

    `build(run, tokenizer)` returns a `sky_core.training.objective.Objective`; it may hold further models (a teacher, a
    reference) and trainable parameters of its own.
    """

    slot: ClassVar = "objective"

    @abstractmethod
    def build(self, run: Run, tokenizer: BuiltTokenizer) -> BuiltObjective: ...


class Optimizer(Component):
    """Offered through `sky_optimizers`.

    `build(named_parameters, lr_scale)` returns a list of `torch.optim.Optimizer`; every parameter that requires a
    gradient is in exactly one group. The learning rate in each group is the peak that the schedule multiplies.
    `lr_scale` maps names to factors of Adam's learning rate (muP; 1 where a name is absent): rules whose step does not
    grow with the width of a matrix leave it aside.
    """

    slot: ClassVar = "optimizer"

    @abstractmethod
    def build(
        self, named_parameters: list[tuple[str, torch.nn.Parameter]], lr_scale: Mapping[str, float] = NO_SCALE
    ) -> list[torch.optim.Optimizer]: ...


class Schedule(Component):
    """The learning rate as a pure function of the step. Offered through `sky_schedules`.

    `build(steps)` returns `multiplier(step) -> float` with step in 0..steps-1; its maximum is 1.
    """

    slot: ClassVar = "schedule"

    @abstractmethod
    def build(self, steps: int) -> Callable[[int], float]: ...


class Engine(Component):
    """Backward, step, precision, sharding, save and load. Offered through `sky_engines`.

    `build()` returns a `sky_core.training.engine.Engine`. Engines that shard or cast what training holds say in
    `memory` what is left on each process.
    """

    slot: ClassVar = "engine"

    @abstractmethod
    def build(self) -> BuiltEngine: ...

    def memory(self, parameters: Mapping[str, int], state_bytes: int, precision: str, processes: int) -> int:
        """Bytes that each of `processes` holds to train a model, activations left out (`sky show` prints them).

        `parameters` are the model's counts (`LanguageModel.n_parameters`), all of them trained, and `state_bytes` what
        the optimizer keeps of them. Here all of it is on each process: weights and gradients in fp32, the state, and in
        "bf16" the copies of the body's matrices that autocast makes for a step.
        """
        return 8 * parameters["total"] + state_bytes + (2 * parameters["body"] if precision == "bf16" else 0)


class Trainer(Component):
    """A training loop. Offered through `sky_trainers`.

    `build(run, directory)` returns an object with `resume(checkpoint: Path | None) -> None` (None: a run without one),
    called once, then `train() -> Result`; `sky_core.training.trainer.Trainer` is the reference.
    """

    slot: ClassVar = "trainer"

    @abstractmethod
    def build(self, run: Run, directory: Any) -> BuiltTrainer: ...


class Callback(Component):
    """Something that watches a run. Offered through `sky_callbacks`.

    `build(trainer)` returns an object with any of `on_start()`, `on_step(step, metrics)`, `on_eval(step, results)`,
    `on_save(step, path)` and `on_end(result)`; each is bound once, before the loop.
    """

    slot: ClassVar = "callback"

    @abstractmethod
    def build(self, trainer: Any) -> Any: ...


class Eval(Component):
    """A measurement of a model. Offered through `sky_evals`.

    `build()` returns a callable `(model, tokenizer, dataset, autocast) -> dict[str, float]` that leaves the model, its
    training mode and every random generator as they were. Where `needs_data` is False the callable takes None for the
    dataset.

    Names of results are `task/metric` or `task/part/metric`; `..._stderr` is the standard error of what it is named
    after, and `.../items` the number of items it was taken over.
    """

    slot: ClassVar = "eval"
    needs_data: ClassVar[bool] = True

    @abstractmethod
    def build(self) -> Callable[..., dict[str, float]]: ...


class Sampler(Component):
    """Chooses the next token. Offered through `sky_samplers`.

    `build()` returns a callable `(logits_BV, tokens, generator) -> next_B`; `tokens` holds, per row, the ids so far.
    Where the choice is a draw from a distribution, the callable has it as `probabilities(logits_BV, tokens) -> p_BV`
    (float64, rows of sum 1): what decoding with a draft needs, and refuses to do without.
    """

    slot: ClassVar = "sampler"

    @abstractmethod
    def build(self) -> Callable[..., torch.Tensor]: ...


class Section(Component):
    """A plugin's own top-level table in the run file, under the key `kind`. Offered through `sky_sections`."""

    slot: ClassVar = "section"


HOOKS: dict[str, type[Component]] = {
    "sky_models": Model,
    "sky_blocks": Block,
    "sky_attention": Attention,
    "sky_kernels": Kernel,
    "sky_feedforwards": FeedForward,
    "sky_positions": Position,
    "sky_norms": Norm,
    "sky_memories": Memory,
    "sky_adapters": Adapter,
    "sky_tokenizers": Tokenizer,
    "sky_datasets": Dataset,
    "sky_objectives": Objective,
    "sky_optimizers": Optimizer,
    "sky_schedules": Schedule,
    "sky_engines": Engine,
    "sky_trainers": Trainer,
    "sky_callbacks": Callback,
    "sky_evals": Eval,
    "sky_samplers": Sampler,
    "sky_sections": Section,
}
"""Offer hook -> base class of what it returns."""
