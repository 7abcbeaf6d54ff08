"""The laboratory from Python, as the package's docstring shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sky_core
from sky_core import api
from sky_core.config import read_run
from sky_core.errors import CheckpointError, UserError
from sky_core.training import checkpoint
from sky_core.yaml_file import read_yaml


def test_three_lines_train_load_and_generate(lab: Any) -> None:
    run = sky_core.train("run.yaml", overrides=["model.n_layer=2"])
    assert (run.state, run.step) == ("done", 6)
    assert run.evaluation["loss"] > 0
    model, tokenizer = sky_core.load(run.directory)
    tokens_BT = torch.tensor([tokenizer.encode("the cat")])
    assert model(tokens_BT).shape == (1, 7, tokenizer.vocab_size)
    assert (model.n_layer, model.training) == (2, False)
    text = sky_core.generate(model, tokenizer, "the", max_new_tokens=5)
    assert text == sky_core.generate(model, tokenizer, "the", max_new_tokens=5)


def test_the_names_stay_functions_whatever_is_imported() -> None:
    import sky_core.generation.text
    import sky_core.training.trainer

    assert callable(sky_core.train)
    assert callable(sky_core.generate)
    assert callable(sky_core.load)
    with pytest.raises(AttributeError, match="no attribute 'sample'"):
        _ = sky_core.sample


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, sky_core; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_is_given_as_a_file_a_mapping_or_a_run(lab: Any) -> None:
    by_file = api.train("run.yaml")
    by_mapping = api.train(read_yaml(Path("run.yaml"))[0])
    by_run = api.train(read_run("run.yaml"))
    assert lab.tensors(by_file.directory) == lab.tensors(by_mapping.directory) == lab.tensors(by_run.directory)
    assert (by_file.directory / "config.input.yaml").read_text() == Path("run.yaml").read_text()
    with pytest.raises(UserError, match=r"overrides \(seed=2\) change a run file"):
        api.train(read_run("run.yaml"), ["seed=2"])


def test_load_takes_every_way_to_name_a_checkpoint(lab: Any) -> None:
    run = lab.train("name=alpha").directory
    for source, step in {
        run: 6,
        str(run): 6,
        "alpha": 6,
        "alph": 6,
        "@last": 6,
        "alpha@4": 4,
        f"{run}@4": 4,
        "run:alpha@4": 4,
        run / "checkpoints" / "step_000004": 4,
        "@best": checkpoint.step_of((run / "checkpoints" / "best").resolve()),
    }.items():
        expected = checkpoint.load_tensors(run / "checkpoints" / checkpoint.checkpoint_name(step), "model")
        model, _ = sky_core.load(source)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()), source
    with pytest.raises(UserError, match=r"there is no checkpoint 'step_000005' \(have: step_000004, step_000006\)"):
        sky_core.load("alpha@5")
    with pytest.raises(UserError, match=r"no such directory|no run called"):
        sky_core.load("nothing")


def test_load_gives_the_averages_of_a_run_that_kept_them(lab: Any) -> None:
    run = lab.train("train.ema=0.5").directory
    folder = run / "checkpoints" / "last"
    averages, weights = (checkpoint.load_tensors(folder, stem) for stem in ("training/ema", "model"))
    state = sky_core.load(run)[0].state_dict()
    assert {f"model.{name}" for name in state} == averages.keys() - {"n_updates"}
    assert all(torch.equal(tensor, averages[f"model.{name}"]) for name, tensor in state.items())
    assert not any(torch.equal(tensor, weights[name]) for name, tensor in state.items())


def test_the_validation_loss_of_a_run_is_that_of_what_is_loaded(lab: Any) -> None:
    from sky_core.eval.loss import validation_loss

    result = lab.train("train.ema=0.5")
    model, tokenizer = sky_core.load(result.directory)
    config = read_run(result.directory / "config.yaml")
    dataset = config.data.build(config.seed, config.tokenizer)
    # the trainer may cut the split into other batches than this does
    assert validation_loss(model, tokenizer, dataset) == pytest.approx(result.evaluation, rel=1e-6)


def test_a_run_starts_from_the_weights_of_another(lab: Any) -> None:
    first = lab.train("train.steps=2").directory
    lab.write(init=str(first), train={"steps": 1}, optimizer={"lr": 1e-30}, schedule={"kind": "constant", "warmup": 0})
    second = lab.train().directory
    before, after = (checkpoint.load_tensors(run / "checkpoints" / "last", "model") for run in (first, second))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer={kind: byte, end_of_text: false}"], "init: .* was trained with tokenizer"),
        (["model.d_model=32"], "does not fit the model"),
        (["init=nowhere"], "nowhere"),
    ],
)
def test_start_weights_that_do_not_fit_are_refused(lab: Any, overrides: list[str], message: str) -> None:
    first = lab.train("train.steps=1").directory
    with pytest.raises(UserError, match=message):
        lab.train(f"init={first}", *overrides)


def test_load_refuses_a_folder_that_is_no_run_and_a_damaged_one(lab: Any) -> None:
    Path("texts").mkdir()
    with pytest.raises(UserError, match="this is no run directory"):
        sky_core.load("texts")
    run = lab.train("train.steps=1").directory
    (run / "checkpoints" / "last" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has 1 bytes instead of"):
        sky_core.load(run)


def test_open_run_reads_what_is_there(lab: Any) -> None:
    result = lab.train("train.steps=1")
    run = api.open_run(result.directory)
    assert run.info["state"] == "done"
    assert run.metrics()[0]["step"] == 1
    assert {event["event"] for event in run.events()} == {"eval", "checkpoint"}


def test_a_plugin_may_load_what_it_knows(lab: Any) -> None:
    Path("other.py").write_text(
        "from sky_core import hookimpl\n"
        "@hookimpl\n"
        "def sky_load_model(source):\n"
        "    return ('model', 'tokenizer') if source == 'toy:x' else None\n"
    )
    from sky_core.plugins import load_plugins

    load_plugins(["./other.py"])
    assert sky_core.load("toy:x") == ("model", "tokenizer")
