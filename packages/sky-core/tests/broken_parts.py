"""Parts with one fault each, and the standard test that must find it (`finds`). Run by test_contracts_find.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from sky_core import slots
from sky_core.components import attention, model, position
from sky_core.components.training import NextToken
from sky_core.data.dataset import Batch
from sky_core.model.adapter import Attached, linears
from sky_core.model.attention import SelfAttention
from sky_core.model.cache import KVCache
from sky_core.model.decoder import DecoderLM
from sky_core.testing import (
    AdapterContract,
    AttentionContract,
    BlockContract,
    CallbackContract,
    ComponentContract,
    DatasetContract,
    EngineContract,
    EvalContract,
    FeedForwardContract,
    KernelContract,
    MemoryContract,
    ModelContract,
    NormContract,
    ObjectiveContract,
    OptimizerContract,
    PositionContract,
    SamplerContract,
    ScheduleContract,
    SectionContract,
    TokenizerContract,
    TrainerContract,
)
from sky_core.testing.workbench import TinyData, TinyDataset, dense_kernel
from sky_core.tokenizer.byte import ByteTokenizer
from sky_core.training.engine import LocalEngine
from sky_core.training.objective import Loss
from sky_core.training.objective import NextToken as BuiltNextToken


def part(base: type[slots.Component], build: Any, **methods: Any) -> Any:
    """A component of that slot whose `build` is given."""
    cls = type("Broken", (base,), {"__doc__": "Broken.", "__module__": __name__, "build": build} | methods)
    cls.kind = "broken"
    cls.steps = 3
    return cls()


# --------------------------------------------------------------------------------------------------- attention


class Peeking(SelfAttention):
    def forward(self, x_BTD: torch.Tensor, ctx: Any) -> torch.Tensor:
        return super().forward(x_BTD, replace(ctx, mask=replace(ctx.mask, causal=False)))


class TestPeeking(AttentionContract):
    component = part(slots.Attention, lambda self, spec: Peeking(spec))
    finds = "test_future_tokens_do_not_change_the_past"


class TestPeekingIsSeen(AttentionContract):
    component = part(slots.Attention, lambda self, spec: Peeking(spec))
    finds = "test_each_query_sees_what_is_visible_and_nothing_else"


class TestNotWhatItSays(AttentionContract):
    component = attention.Full()
    visible = staticmethod(lambda t, s: 0 <= t - s < 4)
    finds = "test_it_equals_softmax_attention_over_what_is_visible"


class Timeless(SelfAttention):
    def forward(self, x_BTD: torch.Tensor, ctx: Any) -> torch.Tensor:
        return super().forward(x_BTD, replace(ctx, positions_BT=torch.arange(x_BTD.shape[1])[None]))


class TestTimeless(AttentionContract):
    component = part(slots.Attention, lambda self, spec: Timeless(spec))
    finds = "test_decoding_in_pieces_equals_the_parallel_forward[steps]"


class Aligned(KVCache):
    def update(self, k: torch.Tensor, v: torch.Tensor, ctx: Any) -> Any:
        return super().update(k, v, replace(ctx, aligned=True))


class AlignedAttention(SelfAttention):
    def new_cache(self, batch: int, max_length: int, device: Any, dtype: Any) -> KVCache:
        return Aligned.empty(batch, self.n_kv_head, max_length, self.head_dim, self.head_dim, device, dtype)


class TestAligned(AttentionContract):
    component = part(slots.Attention, lambda self, spec: AlignedAttention(spec))
    finds = "test_rows_of_different_lengths_decode_as_if_alone"


class Deaf(SelfAttention):
    def forward(self, x_BTD: torch.Tensor, ctx: Any) -> torch.Tensor:
        return super().forward(x_BTD, replace(ctx, prefixes={}))


class TestDeaf(AttentionContract):
    component = part(slots.Attention, lambda self, spec: Deaf(spec))
    finds = "test_every_query_sees_the_key_value_prefix"


class Mingling(SelfAttention):
    def forward(self, x_BTD: torch.Tensor, ctx: Any) -> torch.Tensor:
        return super().forward(x_BTD, replace(ctx, mask=replace(ctx.mask, documents_BS=None)))


class TestMingling(AttentionContract):
    component = part(slots.Attention, lambda self, spec: Mingling(spec))
    finds = "test_documents_of_a_packed_row_do_not_see_each_other"


class TestUnrefused(AttentionContract):
    component = attention.Full()
    documents = False
    finds = "test_documents_of_a_packed_row_do_not_see_each_other"


# ------------------------------------------------------------------------------------------ other parts of layers


class TestTwistedHeads(KernelContract):
    component = part(
        slots.Kernel,
        lambda self: (
            lambda q, k, v, mask, **o: dense_kernel(
                q, *(x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v)), mask, scale=o["scale"]
            )
        ),
    )
    finds = "test_it_equals_the_equation_with_gradients[causal-GQA]"


class TestFlat(KernelContract):
    component = part(
        slots.Kernel, lambda self: lambda q, k, v, mask, **o: dense_kernel(q, k, v, replace(mask, slopes_H=None), **o)
    )
    finds = "test_it_equals_the_equation_with_gradients[slopes-GQA]"


class Mixing(nn.Module):
    def forward(self, x_BTD: torch.Tensor, ctx: Any) -> torch.Tensor:
        return x_BTD + x_BTD.mean(1, keepdim=True)


class TestMixing(FeedForwardContract):
    component = part(slots.FeedForward, lambda self, spec: Mixing())
    finds = "test_tokens_do_not_mix"


class Counting(nn.Module):
    """Counts tokens, in every pass or in training alone, and never clears what it counted."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.always = always
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x_BTD: torch.Tensor, ctx: Any) -> torch.Tensor:
        if self.always or (self.training and torch.is_grad_enabled()):
            self.seen += x_BTD.shape[1]
        return x_BTD


class TestCounting(FeedForwardContract):
    component = part(slots.FeedForward, lambda self, spec: Counting(always=True))
    finds = "test_passes_outside_of_training_leave_no_trace"


class TestNeverCleared(FeedForwardContract):
    component = part(slots.FeedForward, lambda self, spec: Counting(always=False))
    finds = "test_a_step_of_training_leaves_what_a_checkpoint_holds_and_nothing_else"


class Bare(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()


class TestBare(NormContract):
    component = part(slots.Norm, lambda self, dim: Bare())
    finds = "test_zeros_and_large_values_are_finite"


class TestWrongPlace(PositionContract):
    component = position.Rope()
    acts = "embedding"
    finds = "test_embeddings_change_with_the_position_where_it_acts_there"


class Forgetful(nn.Module):
    def __init__(self, attention: nn.Module, feedforward: nn.Module) -> None:
        super().__init__()
        self.attention, self.feedforward = attention, feedforward

    def forward(self, x_BTD: torch.Tensor, ctx: Any) -> torch.Tensor:
        return x_BTD + self.attention(x_BTD, ctx) + self.feedforward(x_BTD, ctx)


class TestForgetful(BlockContract):
    component = part(slots.Block, lambda self, spec, attention, feedforward, memory: Forgetful(attention, feedforward))
    finds = "test_each_branch_acts_and_sees_the_context[memory]"


class Hoarding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0.0

    def forward(self, x_BTD: torch.Tensor, ctx: Any) -> torch.Tensor:
        y_BTD, self.seen = x_BTD * self.seen, self.seen + 1.0
        return y_BTD

    def new_cache(self, batch: int, *_: Any) -> KVCache:
        return KVCache(torch.zeros(batch), torch.zeros(batch))


class TestHoarding(MemoryContract):
    component = part(slots.Memory, lambda self, spec: Hoarding())
    finds = "test_nothing_is_remembered_outside_of_the_state"


# ---------------------------------------------------------------------------------------------- models and around


class Averaging(DecoderLM):
    def nll(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return super().nll(hidden_BTD, targets_BT) / targets_BT.numel()


SMALL = model.Decoder(n_layer=1, n_head=2, d_model=16, max_length=16)


class TestAveraging(ModelContract):
    component = part(slots.Model, lambda self, vocab_size: Averaging(SMALL, vocab_size))
    finds = "test_nll_is_the_summed_cross_entropy_of_the_targets[7]"


def loud(self: Any, model: Any) -> Attached:
    (linear,) = linears(model, ["layers.0.self_attn.q_proj"]).values()
    delta = nn.Linear(linear.in_features, linear.out_features)
    attached = Attached(model, delta)
    attached.linear(linear, lambda x, y: y + delta(x))
    return attached


class TestLoud(AdapterContract):
    component = part(slots.Adapter, loud)
    finds = "test_attached_it_changes_nothing_bit_for_bit"


class Lossy(ByteTokenizer):
    def encode(self, text: str) -> list[int]:
        return super().encode(text.strip())


class TestLossy(TokenizerContract):
    component = part(
        slots.Tokenizer,
        lambda self: None,
        train=lambda self, texts: Lossy(end_of_text=True),
        load=classmethod(lambda cls, folder: Lossy.load(folder)),
    )
    finds = "test_text_comes_back_exactly[leading and trailing spaces]"


class Stuck(TinyDataset):
    def _order(self, epoch: int) -> list[int]:
        return [0, *super()._order(epoch)[1:]]


class TestStuck(DatasetContract):
    component = part(TinyData, lambda self, seed, tokenizer: Stuck(ByteTokenizer(end_of_text=True), seed=seed))
    finds = "test_an_epoch_holds_every_sequence_once"


class MeanObjective(BuiltNextToken):
    def forward(self, model: Any, batch: Batch) -> Loss:
        loss = super().forward(model, batch)
        return Loss(loss.total / max(batch.n_targets(), 1))


class TestMeanObjective(ObjectiveContract):
    component = part(NextToken, lambda self, run, tokenizer: MeanObjective())
    finds = "test_micro_batches_give_the_gradient_of_the_whole[[3, 1]]"


# ------------------------------------------------------------------------------------------------------ training


class TestOmitting(OptimizerContract):
    component = part(slots.Optimizer, lambda self, named: [torch.optim.SGD([p for _, p in named][:-1], lr=0.1)])
    finds = "test_every_trainable_parameter_is_in_exactly_one_group"


class TestWithoutFactors(OptimizerContract):
    component = part(slots.Optimizer, lambda self, named: [torch.optim.SGD([p for _, p in named], lr=0.1)])
    finds = "test_factors_of_the_learning_rate_move_no_parameter_out_of_its_group"


class TestOvershooting(ScheduleContract):
    component = part(slots.Schedule, lambda self, steps: lambda step: 1.5)
    finds = "test_multipliers_are_not_negative_and_peak_at_one[10]"


class Skipless(LocalEngine):
    def update(self, *, skip: bool) -> None:
        super().update(skip=False)


class TestSkipless(EngineContract):
    component = part(slots.Engine, lambda self: Skipless())
    finds = "test_a_skipped_update_changes_nothing_and_clears_the_gradients"


class Idle:
    def __init__(self, directory: Any) -> None:
        self.directory, self.callbacks = directory, []

    def resume(self, folder: Any) -> None: ...

    def train(self) -> Any:
        from sky_core.training.trainer import Result

        return Result(self.directory.path, "done", 3)


class TestIdle(TrainerContract):
    component = part(slots.Trainer, lambda self, run, directory: Idle(directory))
    finds = "test_callbacks_hear_of_every_step"


class TestTypo(CallbackContract):
    component = part(slots.Callback, lambda self, trainer: type("Typo", (), {"on_stepp": lambda *_: None})())
    finds = "test_it_listens_to_events_that_exist"


def rude(model: Any, *_: Any) -> dict[str, float]:
    model.eval()
    return {"one": 1.0}


class TestRude(EvalContract):
    component = part(slots.Eval, lambda self: rude)
    finds = "test_the_model_is_left_as_it_was"


class TestGlobalDice(SamplerContract):
    component = part(slots.Sampler, lambda self: lambda x, tokens, generator: torch.multinomial(x.softmax(-1), 1)[:, 0])
    finds = "test_only_the_given_generator_is_drawn_from"


class Model(slots.Section):
    """A table whose name is taken."""

    kind: ClassVar = "model"


class TestTaken(SectionContract):
    component = Model()
    finds = "test_the_key_is_free"


class Silent(slots.Section):
    """A table with an option that says nothing, and a default that is none."""

    kind: ClassVar = "silent"
    every: int = "often"  # type: ignore[assignment]


class TestSilent(ComponentContract):
    component = Silent()
    finds = "test_every_option_has_a_description"


class TestBadDefault(ComponentContract):
    component = Silent()
    finds = "test_the_defaults_are_valid"


class TestHeavy(ComponentContract):
    component = Silent()
    finds = "test_the_module_imports_no_torch"
