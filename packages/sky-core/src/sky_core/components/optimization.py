"""Optimizers and learning-rate schedules (torch-free: schema here, code in `sky_core.training`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from sky_core.slots import NO_SCALE, Optimizer, Schedule

if TYPE_CHECKING:
    import torch

Rate = Annotated[float, Field(gt=0, description="peak learning rate; the schedule multiplies it")]
Decay = Annotated[float, Field(ge=0, description="decoupled weight decay, per unit of learning rate")]
Patterns = Annotated[tuple[str, ...], Field(strict=False)]
WarmUp = Annotated[float, Field(ge=0, description="rising steps at the start: a number, or a fraction below 1")]
Final = Annotated[float, Field(ge=0, le=1, description="learning rate at the end, relative to the peak")]
DecaySteps = Annotated[int | None, Field(ge=1, description="step at which `final` is reached; null: the run's end")]
Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); vectors are never decayed."""

    kind: ClassVar = "adamw"
    paper: ClassVar = "arXiv:1711.05101"

    lr: Rate = 1e-3
    betas: Annotated[
        tuple[Beta, Beta], Field(strict=False, description="decay of the first and second moment per step")
    ] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0, description="added to the root of the second moment")] = 1e-8
    weight_decay: Decay = 0.1
    decay_embeddings: Annotated[bool, Field(description="decay embeddings and heads too")] = True
    no_decay: Annotated[
        Patterns, Field(description="name patterns (as in a shell) of further parameters to spare")
    ] = ()
    fused: Annotated[
        Literal["auto"] | bool,
        Field(description="torch's one-pass kernel (auto: where there is one), or ours in the open"),
    ] = "auto"

    def build(
        self, named_parameters: list[tuple[str, torch.nn.Parameter]], lr_scale: Mapping[str, float] = NO_SCALE
    ) -> list[torch.optim.Optimizer]:
        from sky_core.training import groups
        from sky_core.training.adamw import build_adamw

        parameters = groups.trainable(named_parameters)
        spared = groups.matching(self.no_decay, [name for name, _ in parameters], "optimizer.no_decay")
        decay = groups.decay_groups(
            parameters, self.weight_decay, decay_embeddings=self.decay_embeddings, no_decay=spared
        )
        decay = groups.scale_groups(decay, self.lr, lr_scale)
        return [build_adamw(decay, lr=self.lr, betas=self.betas, eps=self.eps, fused=self.fused)]


class Muon(Optimizer):
    """Orthogonalised momentum for hidden matrices, AdamW for embeddings, heads and vectors (Jordan et al. 2024)."""

    kind: ClassVar = "muon"
    paper: ClassVar = "https://kellerjordan.github.io/posts/muon/"

    lr: Rate = 0.02
    momentum: Annotated[float, Field(ge=0, lt=1, description="decay of the momentum per step")] = 0.95
    nesterov: Annotated[bool, Field(description="look ahead: mix the gradient into the momentum once more")] = True
    weight_decay: Decay = 0.05
    scale: Annotated[
        Literal["original", "match_rms_adamw"],
        Field(description="sqrt(max(1, rows/columns)), or 0.2 sqrt(max(rows, columns)), which suits AdamW's lr"),
    ] = "original"
    iteration: Annotated[
        Literal["newton_schulz", "polar_express"], Field(description="the polynomials that orthogonalise")
    ] = "newton_schulz"
    steps: Annotated[int, Field(ge=1, le=20, description="iterations of the polynomial")] = 5
    exclude: Annotated[Patterns, Field(description="name patterns (as in a shell) of matrices left to AdamW")] = ()
    adamw: Annotated[AdamW, Field(description="options of AdamW for what is no hidden matrix")] = AdamW(lr=3e-3)

    def build(
        self, named_parameters: list[tuple[str, torch.nn.Parameter]], lr_scale: Mapping[str, float] = NO_SCALE
    ) -> list[torch.optim.Optimizer]:
        from sky_core.training import groups, muon

        parameters = groups.trainable(named_parameters)
        hidden, others = muon.split(parameters, self.exclude)
        optimizer = muon.Muon(
            [{"params": hidden}],
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            scale=self.scale,
            iteration=self.iteration,
            steps=self.steps,
        )
        return [optimizer, *(self.adamw.build(others, lr_scale) if others else [])]


class Constant(Schedule):
    """The peak learning rate after a linear warm-up."""

    kind: ClassVar = "constant"

    warmup: WarmUp = 0.02

    def build(self, steps: int) -> Callable[[int], float]:
        from sky_core.training import schedule

        return schedule.constant(steps, warmup=self.warmup)


class Linear(Schedule):
    """A straight line down from the peak after a linear warm-up."""

    kind: ClassVar = "linear"

    warmup: WarmUp = 0.02
    final: Final = 0.0
    decay_steps: DecaySteps = None

    def build(self, steps: int) -> Callable[[int], float]:
        from sky_core.training import schedule

        return schedule.linear(steps, warmup=self.warmup, final=self.final, decay_steps=self.decay_steps)


class Cosine(Schedule):
    """Half a cosine down from the peak after a linear warm-up (Loshchilov & Hutter 2017, without restarts)."""

    kind: ClassVar = "cosine"
    paper: ClassVar = "arXiv:1608.03983"

    warmup: WarmUp = 0.02
    final: Final = 0.1
    decay_steps: DecaySteps = None

    def build(self, steps: int) -> Callable[[int], float]:
        from sky_core.training import schedule

        return schedule.cosine(steps, warmup=self.warmup, final=self.final, decay_steps=self.decay_steps)


class WSD(Schedule):
    """Warm-up, a stable stretch at the peak, and a decay at the end (Hu et al. 2024)."""

    kind: ClassVar = "wsd"
    paper: ClassVar = "arXiv:2404.06395"

    warmup: WarmUp = 0.02
    decay: Annotated[float, Field(ge=0, description="falling steps at the end: a number, or a fraction below 1")] = 0.2
    final: Final = 0.0
    shape: Annotated[
        Literal["linear", "sqrt"], Field(description="of the decay; sqrt is 1 - sqrt (Hägele et al. 2024)")
    ] = "sqrt"

    def build(self, steps: int) -> Callable[[int], float]:
        from sky_core.training import schedule

        return schedule.wsd(steps, warmup=self.warmup, decay=self.decay, final=self.final, shape=self.shape)
