"""A loose-file plugin of toys: the smallest part of each kind that is still to come, to see that the slots fit.

One file, so torch is imported at the top; a package keeps its components apart from what they build.

B batch, T time (tokens), S keys, D model width, H heads, E width of a head, R width of the latent, W window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import click
import torch
from einops import rearrange
from pydantic import Field
from torch import nn

from sky_core import hookimpl, slots
from sky_core.data.dataset import IGNORE, Batch
from sky_core.errors import ConfigError
from sky_core.model.adapter import Attached, linears
from sky_core.model.cache import LayerCache
from sky_core.model.context import Context
from sky_core.model.language_model import LanguageModel
from sky_core.model.mask import Mask
from sky_core.testing.workbench import TinyData
from sky_core.training.objective import Loss, Objective

sky_api = 2
EVENTS: list[str] = []
"""Which event hooks were called, in order."""

# ------------------------------------------------------------------ attention whose cache is a compressed latent


class LatentCache(LayerCache):
    """The latent of every token, and the one rotated key that all heads share."""

    def __init__(self, latent_BSR: torch.Tensor, key_BSE: torch.Tensor) -> None:
        self.latent_BSR, self.key_BSE = latent_BSR, key_BSE

    def update(
        self, latent_BTR: torch.Tensor, key_BTE: torch.Tensor, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows_B1 = torch.arange(len(latent_BTR))[:, None]
        slots_BT = torch.arange(ctx.end - latent_BTR.shape[1], ctx.end)[None] if ctx.slots_BT is None else ctx.slots_BT
        self.latent_BSR[rows_B1, slots_BT] = latent_BTR
        self.key_BSE[rows_B1, slots_BT] = key_BTE
        return self.latent_BSR[:, : ctx.end], self.key_BSE[:, : ctx.end]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"latent": self.latent_BSR, "key": self.key_BSE}

    def replace(self, tensors: dict[str, torch.Tensor]) -> LatentCache:
        return LatentCache(tensors["latent"], tensors["key"])

    def reset(self, rows_B: torch.Tensor) -> None:
        """Nothing to do: a row of length 0 sees none of its slots."""


class LatentAttention(nn.Module):
    """Keys and values of all heads from one narrow latent per token (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    def __init__(self, spec: slots.AttentionSpec, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        heads = spec.n_head * spec.head_dim
        self.q_proj = nn.Linear(spec.d_model, 2 * heads, bias=False)
        self.kv_a_proj = nn.Linear(spec.d_model, width + spec.head_dim, bias=False)
        self.kv_b_proj = nn.Linear(width, 2 * heads, bias=False)
        self.o_proj = nn.Linear(heads, spec.d_model, bias=False)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        q, q_turned = rearrange(self.q_proj(x_BTD), "B T (two H E) -> two B H T E", two=2, H=self.spec.n_head)
        latent, key = self.kv_a_proj(x_BTD).split([self.width, self.spec.head_dim], dim=-1)
        q_turned, key = self.spec.position.rotate(q_turned, key[:, None], ctx)
        key = key[:, 0]
        if ctx.cache is not None:
            latent, key = ctx.cache.layers[self.spec.layer].update(latent, key, ctx)
        k, v = rearrange(self.kv_b_proj(latent), "B S (two H E) -> two B H S E", two=2, H=self.spec.n_head)
        k = torch.cat((k, key[:, None].expand_as(k)), dim=-1)
        mask = ctx.mask
        if self.spec.layer in ctx.prefixes:
            k_front, v_front = ctx.prefixes[self.spec.layer]
            k, v, mask = torch.cat((k_front, k), 2), torch.cat((v_front, v), 2), mask.with_front(k_front.shape[2])
        y = self.spec.kernel(torch.cat((q, q_turned), -1), k, v, mask, scale=k.shape[-1] ** -0.5, dropout=0.0)
        return self.o_proj(rearrange(y, "B H T E -> B T (H E)"))

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> LatentCache:
        widths = (self.width, self.spec.head_dim)
        return LatentCache(*(torch.zeros(batch, max_length, width, device=device, dtype=dtype) for width in widths))


class Latent(slots.Attention):
    """Attention that caches one narrow latent per token."""

    kind: ClassVar = "toy_latent"
    width: Annotated[int, Field(ge=1, description="width of the latent")] = 12

    def build(self, spec: slots.AttentionSpec) -> nn.Module:
        return LatentAttention(spec, self.width)


# ---------------------------------------------------------------- attention whose cache holds the last tokens only


class WindowCache(LayerCache):
    """Keys and values of the last W tokens of each row, the newest last; `filled_B` of them are real."""

    def __init__(self, k_BGWE: torch.Tensor, v_BGWE: torch.Tensor, filled_B: torch.Tensor) -> None:
        self.k_BGWE, self.v_BGWE, self.filled_B = k_BGWE, v_BGWE, filled_B

    def update(
        self, k_BGTE: torch.Tensor, v_BGTE: torch.Tensor, ctx: Context
    ) -> tuple[torch.Tensor, torch.Tensor, Mask]:
        """All keys and values, and the mask over them; takes in the valid new ones."""
        batch, _, tokens, _ = k_BGTE.shape
        window = self.k_BGWE.shape[2]
        keys, values = torch.cat((self.k_BGWE, k_BGTE), dim=2), torch.cat((self.v_BGWE, v_BGTE), dim=2)
        keys_BS = torch.arange(window + tokens) - window + self.filled_B[:, None]
        counts_B = torch.full((batch,), tokens) if ctx.valid_BT is None else ctx.valid_BT.sum(1)
        last_BW = (counts_B[:, None] + torch.arange(window))[:, None, :, None]
        self.k_BGWE = keys.take_along_dim(last_BW, dim=2)
        self.v_BGWE = values.take_along_dim(last_BW, dim=2)
        self.filled_B = (self.filled_B + counts_B).clamp(max=window)
        return keys, values, Mask(window=window, keys_BS=keys_BS)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"k": self.k_BGWE, "v": self.v_BGWE, "filled": self.filled_B}

    def replace(self, tensors: dict[str, torch.Tensor]) -> WindowCache:
        return WindowCache(tensors["k"], tensors["v"], tensors["filled"])

    def reset(self, rows_B: torch.Tensor) -> None:
        self.filled_B[rows_B] = 0


class SlidingAttention(nn.Module):
    """Each token sees the last W, itself included; the cache does not grow."""

    def __init__(self, spec: slots.AttentionSpec, window: int) -> None:
        super().__init__()
        self.spec, self.window = spec, window
        width, kv_width = spec.n_head * spec.head_dim, spec.n_kv_head * spec.head_dim
        self.q_proj = nn.Linear(spec.d_model, width)
        self.k_proj = nn.Linear(spec.d_model, kv_width)
        self.v_proj = nn.Linear(spec.d_model, kv_width)
        self.o_proj = nn.Linear(width, spec.d_model)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        q, k, v = (
            rearrange(project(x_BTD), "B T (H E) -> B H T E", E=self.spec.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.spec.position.rotate(q, k, ctx)
        mask = ctx.mask.with_window(self.window)
        if ctx.cache is not None:
            k, v, mask = ctx.cache.layers[self.spec.layer].update(k, v, ctx)
        if self.spec.layer in ctx.prefixes:
            k_front, v_front = ctx.prefixes[self.spec.layer]
            k, v, mask = torch.cat((k_front, k), 2), torch.cat((v_front, v), 2), mask.with_front(k_front.shape[2])
        y = self.spec.kernel(q, k, v, mask, scale=self.spec.head_dim**-0.5, dropout=0.0)
        return self.o_proj(rearrange(y, "B H T E -> B T (H E)"))

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> WindowCache:
        empty = torch.zeros(batch, self.spec.n_kv_head, self.window, self.spec.head_dim, device=device, dtype=dtype)
        return WindowCache(empty, empty.clone(), torch.zeros(batch, dtype=torch.long, device=device))


class Sliding(slots.Attention):
    """Attention to the last tokens, with a cache of that many."""

    kind: ClassVar = "toy_sliding"
    window: Annotated[int, Field(ge=1, description="tokens a query sees, itself included")] = 4

    def build(self, spec: slots.AttentionSpec) -> nn.Module:
        return SlidingAttention(spec, self.window)


# --------------------------------------------------------------------------------------------- a stateful memory


class MeanCache(LayerCache):
    """One vector per row."""

    def __init__(self, mean_BD: torch.Tensor) -> None:
        self.mean_BD = mean_BD

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean_BD}

    def replace(self, tensors: dict[str, torch.Tensor]) -> MeanCache:
        return MeanCache(tensors["mean"])

    def reset(self, rows_B: torch.Tensor) -> None:
        self.mean_BD[rows_B] = 0


class MeanMemory(nn.Module):
    """m_t = a m_{t-1} + (1 - a) W_v x_t;  y_t = W_o m_t, W_o zero until it is trained."""

    def __init__(self, spec: slots.LayerSpec, decay: float) -> None:
        super().__init__()
        self.spec, self.decay = spec, decay
        self.v_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)
        self.out = nn.Linear(spec.d_model, spec.d_model, bias=False)

    def init_weights(self) -> None:
        nn.init.normal_(self.v_proj.weight, std=self.spec.initializer_range)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_BTD: torch.Tensor, ctx: Context) -> torch.Tensor:
        state = ctx.memory_cache(self.spec.layer)
        mean_BD = torch.zeros_like(x_BTD[:, 0]) if state is None else state.mean_BD
        means = []
        for t, v_BD in enumerate(self.v_proj(x_BTD).unbind(1)):
            moved_BD = self.decay * mean_BD + (1 - self.decay) * v_BD
            valid_B1 = None if ctx.valid_BT is None else ctx.valid_BT[:, t, None]
            mean_BD = moved_BD if valid_B1 is None else torch.where(valid_B1, moved_BD, mean_BD)
            means.append(mean_BD)
        if state is not None:
            state.mean_BD = mean_BD
        return self.out(torch.stack(means, dim=1))

    def new_cache(self, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> MeanCache:
        return MeanCache(torch.zeros(batch, self.spec.d_model, device=device, dtype=dtype))


class Mean(slots.Memory):
    """A moving average of what was read."""

    kind: ClassVar = "toy_mean"
    decay: Annotated[float, Field(gt=0, lt=1, description="what stays of the average at each token")] = 0.9

    def build(self, spec: slots.LayerSpec) -> nn.Module:
        return MeanMemory(spec, self.decay)


# ------------------------------------------------------------------------------------- adapters on the four taps


class LowRank(slots.Adapter):
    """y + B A x on some linears: the tap of a linear's output."""

    kind: ClassVar = "toy_low_rank"
    target: Annotated[list[str], Field(description="names of linears")] = ["q_proj", "lm_head"]

    def build(self, model: LanguageModel) -> Attached:
        chosen = linears(model, self.target)
        down = {path: nn.Linear(linear.in_features, 2, bias=False) for path, linear in chosen.items()}
        up = {path: nn.Linear(2, linear.out_features, bias=False) for path, linear in chosen.items()}
        for layer in up.values():
            nn.init.zeros_(layer.weight)
        module = nn.ModuleDict({path.replace(".", "-"): nn.Sequential(down[path], up[path]) for path in chosen})
        attached = Attached(model, module)
        for path, linear in chosen.items():
            delta = module[path.replace(".", "-")]
            attached.linear(linear, lambda x, y, delta=delta: y + delta(x))
        return attached


class Front(slots.Adapter):
    """Keys and values in front of every layer's own: the tap of prefix tuning."""

    kind: ClassVar = "toy_front"

    def build(self, model: LanguageModel) -> Attached:
        config = model.config
        heads, width = config.n_kv_head or config.n_head, config.width_of_head
        pairs = {str(i): nn.Parameter(torch.randn(2, 1, heads, 3, width)) for i in range(model.n_layer)}
        module = nn.ParameterDict(pairs)
        attached = Attached(model, module)
        attached.prefix(lambda: {int(i): (pair[0], pair[1]) for i, pair in module.items()}, tokens=0)
        return attached


class NewWords(slots.Adapter):
    """A change to the embedding of every token: the tap of the embedding."""

    kind: ClassVar = "toy_new_words"

    def build(self, model: LanguageModel) -> Attached:
        table = nn.Embedding(model.vocab_size, model.embed_tokens.embedding_dim)
        nn.init.zeros_(table.weight)
        attached = Attached(model, table)
        attached.embedding(lambda tokens_BT, x_BTD: x_BTD + table(tokens_BT))
        return attached


class Side(slots.Adapter):
    """A small network beside the frozen one, fed by its states: the tap of the hidden states."""

    kind: ClassVar = "toy_side"

    def build(self, model: LanguageModel) -> Attached:
        mix = nn.ModuleList(nn.Linear(model.embed_tokens.embedding_dim, 4) for _ in range(model.n_layer + 1))
        out = nn.Linear(4, model.embed_tokens.embedding_dim, bias=False)
        nn.init.zeros_(out.weight)
        attached = Attached(model, nn.ModuleList([*mix, out]))

        def beside(states: list[torch.Tensor], h_BTD: torch.Tensor) -> torch.Tensor:
            seen = torch.stack([layer(state) for layer, state in zip(mix, states, strict=True)])
            return h_BTD + out(seen.sum(0).relu())

        attached.hidden(beside)
        return attached


# ---------------------------------------------------------------------------------------------------- objectives


class TeacherObjective(Objective):
    """Cross entropy, and the student's hidden states projected onto those of a frozen teacher."""

    def __init__(self, teacher: LanguageModel, width: int) -> None:
        super().__init__()
        self.teacher = (teacher.requires_grad_(False),)  # a tuple: the teacher is no part of the checkpoint
        self.project = nn.Linear(width, width)

    def prepare(self, model: LanguageModel, batch: Batch) -> Batch:
        wanted_BTD = self.teacher[0].hidden(batch.tokens_BT)
        return Batch(batch.tokens_BT, batch.targets_BT, batch.documents_BT, batch.positions_BT, {"teacher": wanted_BTD})

    def forward(self, model: LanguageModel, batch: Batch) -> Loss:
        hidden_BTD = model.hidden(batch.tokens_BT)
        nll = model.nll(hidden_BTD, batch.targets_BT)
        error_BT = (self.project(hidden_BTD) - batch.extra["teacher"]).square().mean(-1)
        distance = error_BT[batch.targets_BT != IGNORE].sum()
        return Loss(nll + distance, {"nll": nll.detach(), "distance": distance.detach()})


class Teacher(slots.Objective):
    """Learn from the data and from a second model."""

    kind: ClassVar = "toy_teacher"
    teacher: Annotated[str | None, Field(description="a run to load the teacher from; null: a fresh model")] = None

    def build(self, run: Any, tokenizer: Any) -> Objective:
        teacher = run.model.build(tokenizer.vocab_size).eval()
        return TeacherObjective(teacher, teacher.embed_tokens.embedding_dim)


class RolloutObjective(Objective):
    """REINFORCE on sampled continuations; the reward is how often the letter `a` comes, less the row's mean."""

    tokens = 8

    def prepare(self, model: LanguageModel, batch: Batch) -> Batch:
        """Prompts of 4 tokens and their sampled continuations; `advantage` per row."""
        rollout_BT = batch.tokens_BT[:, :4]
        cache = model.new_cache(len(rollout_BT))
        logits_BV = model(rollout_BT, cache=cache)[:, -1]
        for _ in range(self.tokens):
            next_B1 = torch.multinomial(logits_BV.float().softmax(-1), 1)
            rollout_BT = torch.cat((rollout_BT, next_B1), dim=1)
            logits_BV = model(next_B1, cache=cache)[:, -1]
        reward_B = (rollout_BT[:, 4:] % 2 == 1).float().mean(1)
        targets_BT = torch.cat((rollout_BT[:, 1:], rollout_BT[:, :1]), dim=1)
        targets_BT[:, :3] = IGNORE
        targets_BT[:, -1] = IGNORE
        return Batch(rollout_BT, targets_BT, extra={"advantage": reward_B - reward_B.mean()})

    def forward(self, model: LanguageModel, batch: Batch) -> Loss:
        logits_BTV = model(batch.tokens_BT)
        nll_BT = nn.functional.cross_entropy(logits_BTV.mT, batch.targets_BT, ignore_index=IGNORE, reduction="none")
        return Loss((nll_BT * batch.extra["advantage"][:, None]).sum(), {"advantage": batch.extra["advantage"].sum()})


class Rollout(slots.Objective):
    """Sample, reward, reinforce."""

    kind: ClassVar = "toy_rollout"

    def build(self, run: Any, tokenizer: Any) -> Objective:
        return RolloutObjective()


# ------------------------------------------------------------------------------- a trainer, a section, the hooks


class PairTrainer:
    """Two models that learn from the data and from each other, step by step."""

    def __init__(self, options: Pair, run: Any, directory: Any) -> None:
        self.options, self.run, self.directory = options, run, directory
        self.callbacks: list[Any] = []
        self.stopped: str | None = None
        self.dataset = run.data.build(run.seed, run.tokenizer)
        torch.manual_seed(run.seed)
        self.models = [run.model.build(self.dataset.tokenizer.vocab_size) for _ in range(2)]
        self.model = self.models[0]
        self.optimizers = [o for model in self.models for o in run.optimizer.build(list(model.named_parameters()))]

    def request_stop(self, reason: str) -> None:
        self.stopped = reason

    def resume(self, folder: Path | None) -> None:
        assert folder is None, "the toy keeps no checkpoints"

    def train(self) -> Any:
        from sky_core.training.trainer import Result

        self._announce("on_start")
        step = 0
        while step < self.options.steps and self.stopped is None:
            batch = self.dataset.batch(4 * step, 4)
            logits = [model(batch.tokens_BT).log_softmax(-1) for model in self.models]
            nll = sum(nn.functional.nll_loss(x.mT, batch.targets_BT, ignore_index=IGNORE) for x in logits)
            mutual = sum(
                nn.functional.kl_div(mine, other.detach(), log_target=True, reduction="batchmean")
                for mine, other in (logits, logits[::-1])
            )
            (nll + 0.1 * mutual).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            self._announce("on_step", step, {"loss": nll.item() / 2})
        state = "done" if self.stopped is None else "stopped"
        result = Result(self.directory.path, state, step, self.stopped or "")
        self._announce("on_end", result)
        return result

    def _announce(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event, lambda *_: None)(*arguments)


class Pair(slots.Trainer):
    """Co-distillation of two models."""

    kind: ClassVar = "toy_pair"
    steps: Annotated[int, Field(ge=1, description="optimizer steps")]

    def build(self, run: Any, directory: Any) -> Any:
        return PairTrainer(self, run, directory)


class Watch(slots.Section):
    """What to watch in a run."""

    kind: ClassVar = "toy_watch"
    what: Annotated[Literal["loss", "norm"], Field(description="the number to watch")] = "loss"
    every: Annotated[int, Field(ge=1, description="steps between looks")] = 1


@hookimpl
def sky_attention() -> list[type[slots.Attention]]:
    return [Latent, Sliding]


@hookimpl
def sky_memories() -> list[type[slots.Memory]]:
    return [Mean]


@hookimpl
def sky_adapters() -> list[type[slots.Adapter]]:
    return [LowRank, Front, NewWords, Side]


@hookimpl
def sky_objectives() -> list[type[slots.Objective]]:
    return [Teacher, Rollout]


@hookimpl
def sky_trainers() -> list[type[slots.Trainer]]:
    return [Pair]


@hookimpl
def sky_datasets() -> list[type[slots.Dataset]]:
    return [TinyData]


@hookimpl
def sky_sections() -> list[type[slots.Section]]:
    return [Watch]


@hookimpl
def sky_commands(app: click.Group) -> None:
    @app.command()
    def toy() -> None:
        """Say hello."""
        click.echo("hello from a toy")


@hookimpl
def sky_configured(run: Any) -> None:
    EVENTS.append("configured")
    watch = run.section("toy_watch")
    if watch is not None and watch.every > run.train.steps:
        raise ConfigError(f"toy_watch.every: {watch.every} is more than the {run.train.steps} steps of the run")


@hookimpl
def sky_load_model(source: str) -> tuple[LanguageModel, Any] | None:
    if not source.startswith("toy:"):
        return None
    from sky_core.testing.workbench import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    return tiny_model(tokenizer.vocab_size, seed=int(source.removeprefix("toy:"))), tokenizer


@hookimpl
def sky_model_built(model: LanguageModel, run: Any) -> None:
    EVENTS.append(f"model_built with {len(model.adapters)} adapters")


@hookimpl
def sky_trainer_built(trainer: Any, run: Any) -> None:
    EVENTS.append("trainer_built")
    watch = run.section("toy_watch")
    if watch is not None:
        trainer.callbacks.append(_Watcher(watch))


class _Watcher:
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step(self, step: int, metrics: dict[str, Any]) -> None:
        if step % self.watch.every == 0:
            EVENTS.append(f"step {step}: {self.watch.what}")


@hookimpl
def sky_finished(run: Any, result: Any) -> None:
    EVENTS.append(f"finished: {result.state}")


@hookimpl
def sky_doctor() -> dict[str, Any]:
    return {"toys": "ready"}
