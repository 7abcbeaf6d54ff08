"""The training loop: what it computes, what must not disturb it, and how it ends."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from sky_core.data.dataset import IGNORE, Batch
from sky_core.errors import Diverged, SkyError, UserError
from sky_core.run_directory import RunDirectory
from sky_core.slots import Dataset as DatasetSlot
from sky_core.testing.workbench import TinyDataset, assert_close, tiny_run, tiny_tokenizer
from sky_core.training.objective import Loss, NextToken
from sky_core.training.trainer import Trainer, step_seed


class Ragged(TinyDataset):
    """Rows with 0, 1, 2, ... masked targets; every fourth row is masked whole."""

    def batch(self, start: int, count: int) -> Batch:
        batch = super().batch(start, count)
        for row in range(count):
            masked = 16 if (start + row) % 4 == 1 else (start + row) % 16
            batch.targets_BT[row, :masked] = IGNORE
        return batch


class RaggedData(DatasetSlot):
    kind: ClassVar = "ragged"

    def build(self, seed: int, tokenizer: Any) -> Ragged:
        return Ragged(tiny_tokenizer(), seed=seed)


def built(lab: Any, **tables: Any) -> Trainer:
    run = tiny_run(out="runs", **tables)
    return run.train.build(run, RunDirectory.create(run, config_input=""))  # type: ignore[no-any-return]


def fit(**options: Any) -> dict[str, Any]:
    return {"steps": 3, "batch_tokens": 128, "precision": "fp32", "dry_run": False, "clip": None, **options}


# ------------------------------------------------------------------------------------------- what a step computes


def float64_reference(trainer: Trainer, steps: int) -> tuple[torch.nn.Module, list[float]]:
    """The same run written down: one batch, Σ nll / targets, AdamW, all of it in float64."""
    model = copy.deepcopy(trainer.model).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        batch = trainer.dataset.batch(8 * step, 8)
        logits_BTV = model(batch.tokens_BT)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("micro_batch", [1, 2, 4, None])
def test_accumulation_gives_the_step_of_one_large_batch_whatever_is_masked(lab: Any, micro_batch: int | None) -> None:
    # The default eps makes Adam's first steps a sign function, which rounding of a tiny gradient would turn round.
    optimizer = {"kind": "adamw", "lr": 0.01, "eps": 1e-3, "weight_decay": 0.0}
    trainer = built(
        lab,
        data=RaggedData(),
        optimizer=optimizer,
        schedule={"kind": "constant", "warmup": 0},
        train=fit(micro_batch=micro_batch),
        log={"every": 1},
    )
    expected, losses = float64_reference(trainer, 3)
    trainer.train()
    lines = [line for line in lab.metrics(trainer.directory.path) if "loss" in line]
    # fp32 sums of a few hundred terms: about 1e-6 relative, and three steps of lr 0.01 on top
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=2e-6)
    assert [line["tokens"] for line in lines] == [trainer.dataset.batch(8 * step, 8).n_targets() for step in range(3)]
    for name, tensor in trainer.model.state_dict().items():
        assert_close(tensor, expected.state_dict()[name].float(), 5e-6)


def test_a_step_without_a_single_target_moves_nothing_but_momentum_and_is_no_nan(lab: Any) -> None:
    class Masked(Ragged):
        def batch(self, start: int, count: int) -> Batch:
            batch = super().batch(start, count)
            batch.targets_BT[:] = IGNORE
            return batch

    trainer = built(lab, data=RaggedData(), train=fit(micro_batch=2), log={"every": 1})
    trainer.dataset = Masked(tiny_tokenizer())
    trainer.train()
    lines = [line for line in lab.metrics(trainer.directory.path) if "loss" in line]
    assert [(line["loss"], line["grad_norm"], line["tokens"], line["skipped"]) for line in lines] == [(0, 0, 0, 0)] * 3


def test_rollouts_and_forward_passes_draw_from_streams_that_depend_on_the_place_alone(lab: Any) -> None:
    drawn: list[tuple[str, float]] = []

    class Drawing(NextToken):
        def prepare(self, model: Any, batch: Batch) -> Batch:
            drawn.append(("prepare", torch.rand(()).item()))
            return batch

        def forward(self, model: Any, batch: Batch) -> Loss:
            drawn.append(("forward", torch.rand(()).item()))
            return super().forward(model, batch)

    class Disturb:
        """Somebody else who draws from the generator between two steps."""

        def __init__(self, seed: int) -> None:
            self.seed = seed

        def on_step(self, step: int, metrics: dict[str, Any]) -> None:
            torch.manual_seed(self.seed)

    def once(disturbance: int) -> list[tuple[str, float]]:
        drawn.clear()
        trainer = built(lab, train=fit(steps=2, batch_tokens=64, micro_batch=2))
        trainer.objective.__class__ = Drawing
        trainer.callbacks.append(Disturb(disturbance))
        trainer.train()
        return drawn[:]

    first = once(1)
    assert once(2) == first
    assert len({number for _, number in first}) == len(first) == 8


def test_seeds_differ_in_every_place() -> None:
    seeds = {
        step_seed(seed, step, rank, micro)
        for seed in range(3)
        for step in range(5)
        for rank in range(4)
        for micro in range(4)
    }
    assert len(seeds) == 3 * 5 * 4 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 40}, r"batch_tokens: 40 is no multiple of 16 tokens x 1 processes; (32|48) is the nearest"),
        ({"batch_tokens": 8}, "16 is the nearest"),
        ({"micro_batch": 3}, "micro_batch: 3 does not divide the 8 sequences"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(lab: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(lab, train=fit(**options))


# ------------------------------------------------------------------------------- what must not disturb training


@pytest.fixture
def undisturbed(lab: Any) -> Path:
    lab.write(eval={"every": None}, checkpoint={"every": None})
    return lab.train().directory  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "overrides",
    [
        ["eval.every=1"],
        ["eval.every=4", "checkpoint.every=1"],
        ["sample.every=1", "sample.max_new_tokens=3", "sample.prompts=['the cat', 'a']"],
        ["sample.every=2", "sample.max_new_tokens=20", "sample.sampler=greedy"],
        ["train.dry_run=false"],
        ["log.tensorboard=false", "checkpoint.keep_last=1", "checkpoint.keep_best=false"],
    ],
)
def test_looking_more_often_changes_no_loss_and_no_weight(lab: Any, undisturbed: Path, overrides: list[str]) -> None:
    run = lab.train(*overrides).directory
    assert lab.tensors(run) == lab.tensors(undisturbed)
    training = [line for line in lab.metrics(run) if "loss" in line]
    assert training == [line for line in lab.metrics(undisturbed) if "loss" in line]


def test_logging_less_often_changes_no_weight(lab: Any, undisturbed: Path) -> None:
    run = lab.train("log.every=4").directory
    assert lab.tensors(run) == lab.tensors(undisturbed)
    assert [line["step"] for line in lab.metrics(run) if "loss" in line] == [1, 4, 6]


def test_looking_does_not_disturb_averages(lab: Any) -> None:
    rarely = lab.train("train.ema=0.5", "eval.every=null").directory
    often = lab.train("train.ema=0.5", "eval.every=1", "sample.every=1", "sample.max_new_tokens=2").directory
    assert lab.tensors(often) == lab.tensors(rarely)


def test_the_dry_run_leaves_no_trace_in_model_objective_optimizer_or_generators(lab: Any) -> None:
    trainer = built(lab, train=fit(micro_batch=4))
    trainer.objective.register_buffer("seen", torch.zeros(()))
    original = NextToken.forward

    def counting(self: Any, model: Any, batch: Any) -> Loss:
        self.seen += 1
        return original(self, model, batch)

    before = {name: tensor.clone() for name, tensor in trainer.module.state_dict().items()}
    with lab.monkeypatch.context() as patch:
        patch.setattr(NextToken, "forward", counting)
        trainer._dry_run()
    after = trainer.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not trainer.engine.optimizer_state()
    assert all(parameter.grad is None for parameter in trainer.module.parameters())
    assert (trainer.step, trainer.sequences) == (0, 0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_the_dry_run_finds_out_of_memory_and_says_what_helps(lab: Any, error: BaseException) -> None:
    def too_much(*_: Any) -> Any:
        raise error

    lab.monkeypatch.setattr(NextToken, "forward", too_much)
    told = lab.sky("train", "run.yaml")
    assert told.code == 2
    assert told.errors == [
        "sky: out of memory with 4 sequences of 16 tokens at once; lower train.micro_batch (the result is the same),"
        " or set train.activation_checkpointing"
    ]
    (run,) = Path("runs").iterdir()
    assert lab.info(run)["state"] == "failed"


def test_another_error_in_the_dry_run_is_not_taken_for_out_of_memory(lab: Any) -> None:
    def wrong(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    lab.monkeypatch.setattr(NextToken, "forward", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        lab.train()


# --------------------------------------------------------------------------------------------------- NaN and its end


def poison(lab: Any, *steps: int) -> Any:
    """Inside, the loss of these steps (counted from 1) is NaN."""
    original = Trainer._train_step

    def poisoned(trainer: Trainer, *batch: Any) -> Any:
        with lab.monkeypatch.context() as patch:
            if trainer.step + 1 in steps:
                forward = NextToken.forward
                patch.setattr(NextToken, "forward", lambda *given: Loss(forward(*given).total * math.nan))
            return original(trainer, *batch)

    context = lab.monkeypatch.context()
    context.__enter__().setattr(Trainer, "_train_step", poisoned)
    return context


def test_a_step_that_is_not_finite_is_skipped_counted_and_changes_nothing(lab: Any) -> None:
    trainer = built(lab, train=fit(steps=5, ema=0.5), log={"every": 1})
    states: list[dict[str, Any]] = []

    class Watch:
        def on_step(self, step: int, metrics: dict[str, Any]) -> None:
            tensors = {**trainer.engine.state(), **trainer.engine.optimizer_state(), **trainer.ema.state_dict()}
            states.append({name: tensor.clone() for name, tensor in tensors.items()})

    trainer.callbacks.append(Watch())
    context = poison(lab, 2, 4)
    try:
        result = trainer.train()
    finally:
        context.__exit__(None, None, None)

    def same(a: int, b: int) -> bool:
        return all(torch.equal(states[a - 1][name], tensor) for name, tensor in states[b - 1].items())

    assert (same(1, 2), same(2, 3), same(3, 4), same(4, 5)) == (True, False, True, False)
    assert (result.state, trainer.skipped) == ("done", 2)
    lines = [line for line in lab.metrics(result.directory) if "skipped" in line]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, True, False, True, False]
    assert lab.info(result.directory)["skipped"] == 2


def test_too_many_in_a_row_have_diverged_and_earlier_checkpoints_stay_usable(lab: Any) -> None:
    straight = lab.train("train.max_skipped=3").directory
    context = poison(lab, *range(5, 99))
    told = lab.sky("train", "run.yaml", "train.max_skipped=2", "name=bad")
    context.__exit__(None, None, None)
    assert told.code == 3
    assert len(told.errors) == 1
    assert "step 6: 2 steps in a row had no finite loss; resume from an earlier checkpoint" in told.errors[0]
    (run,) = Path("runs").glob("*_bad-*")
    info = lab.info(run)
    assert (info["state"], info["step"], info["skipped"]) == ("diverged", 6, 2)
    assert info["reason"] == told.errors[0].removeprefix("sky: ")
    assert lab.steps(run) == [2, 4]
    lab.resume(run)
    assert lab.tensors(run) == lab.tensors(straight)


def test_finite_steps_in_between_start_the_count_again(lab: Any) -> None:
    context = poison(lab, 1, 2, 4, 5)
    result = lab.train("train.max_skipped=3")
    context.__exit__(None, None, None)
    assert result.state == "done"


def test_skips_in_a_row_are_counted_over_a_resume(lab: Any) -> None:
    context = poison(lab, 3, 4)
    with lab.during(3, lambda trainer: trainer.request_stop("enough")):
        run = lab.train("train.max_skipped=2").directory
    with pytest.raises(Diverged):
        lab.resume(run)
    context.__exit__(None, None, None)


def test_files_of_a_run_without_finite_numbers_are_still_json(lab: Any) -> None:
    context = poison(lab, *range(1, 99))
    from sky_core.eval import loss

    lab.monkeypatch.setattr(loss, "_nll", lambda _, batch: torch.full((len(batch.tokens_BT),), math.nan))
    run = lab.train("train.max_skipped=99").directory
    context.__exit__(None, None, None)

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    for name in ("metrics.jsonl", "events.jsonl"):
        for line in (run / name).read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    for path in (run / "run.json", *run.rglob("state.json")):
        json.loads(path.read_text(), parse_constant=refuse)


# ---------------------------------------------------------------------------------------------------- how it ends


def test_enough_minutes_stop_the_run_and_it_can_be_resumed(lab: Any) -> None:
    result = lab.train("train.max_minutes=1e-9")
    assert (result.state, result.step) == ("stopped", 1)
    assert "max_minutes" in result.reason
    assert lab.resume(result.directory, "train.max_minutes=null").state == "done"


def test_a_stop_in_the_last_step_is_the_end(lab: Any) -> None:
    with lab.during(6, lambda trainer: trainer.request_stop("too late")):
        assert lab.train().state == "done"


def test_a_stop_does_not_save_the_same_step_twice(lab: Any) -> None:
    with lab.during(4, lambda trainer: trainer.request_stop("enough")):
        run = lab.train().directory
    saved = [event["step"] for event in RunDirectory(run).events() if event["event"] == "checkpoint"]
    assert saved == [2, 4]


def test_what_a_callback_raises_is_the_reason_of_the_failure(lab: Any) -> None:
    def fail(trainer: Any) -> None:
        raise SkyError("the callback could not")

    with lab.during(3, fail), pytest.raises(SkyError, match="could not"):
        lab.train()
    (run,) = Path("runs").iterdir()
    assert (lab.info(run)["state"], lab.info(run)["reason"]) == ("failed", "the callback could not")
    assert lab.resume(run).state == "done"


def test_a_prompt_that_cannot_be_sampled_stops_the_run_before_it_starts(lab: Any) -> None:
    told = lab.sky("train", "run.yaml", "sample.every=4", f"sample.prompts=['{'long ' * 9}']")
    assert told.code == 2
    assert "prompt 0 has 45 tokens, more than the model's context of 16" in told.errors[0]
    assert list(Path("runs").iterdir()) == [], "a run that never started leaves nothing behind"


def test_freezing_everything_is_refused(lab: Any) -> None:
    Path("freeze.py").write_text(
        "from sky_core import hookimpl\n@hookimpl\ndef sky_model_built(model, run):\n    model.requires_grad_(False)\n"
    )
    lab.write(plugins=["./freeze.py"])
    with pytest.raises(UserError, match="nothing to train"):
        lab.train()
