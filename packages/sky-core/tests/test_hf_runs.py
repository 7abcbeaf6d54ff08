"""Imported checkpoints are runs: sampled, listed, trained from, exported, and never resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sky_core
import sky_core.hf
from sky_core.components.model import Decoder
from sky_core.config import read_run
from sky_core.errors import UserError
from sky_core.run_directory import find_run
from sky_core.testing.workbench import tiny_tokenizer

pytest.importorskip("tokenizers", reason="Hugging Face tokenizers need it")

TUNE = {"model": ..., "tokenizer": ..., "train": {"steps": 2, "batch_tokens": 64, "precision": "fp32"}}


@pytest.fixture
def folder(lab: Any, tmp_path: Path) -> Path:
    """A Hugging Face checkpoint of a small model over bytes, with a padded embedding."""
    torch.manual_seed(0)
    model = Decoder(n_layer=2, n_head=2, d_model=16, max_length=16, vocab_size=264, qk_norm="head").build(257)
    return sky_core.hf.export(model, tiny_tokenizer(), tmp_path / "small model")


@pytest.fixture
def imported(lab: Any, folder: Path) -> Path:
    told = lab.sky("import", f"hf:{folder}")
    assert told.code == 0, told.err
    return next(Path("runs").iterdir())


def tune(lab: Any, **tables: Any) -> None:
    """run.yaml that trains from somewhere: no model, no tokenizer."""
    from sky_core.yaml_file import dump_yaml

    table = {key: value for key, value in {**lab.table, **TUNE, **tables}.items() if value is not ...}
    Path("run.yaml").write_text(dump_yaml(table))


def weights(source: str | Path) -> dict[str, torch.Tensor]:
    return sky_core.load(source)[0].state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_an_imported_checkpoint_is_a_run_that_is_done(lab: Any, folder: Path, imported: Path) -> None:
    info = lab.info(imported)
    assert (info["name"], info["state"], info["step"], info["tags"]) == ("small-model", "done", 0, ["imported"])
    assert info["lineage"] == {"hf": str(folder), "architecture": "qwen3", "dtype": "float32"}
    assert same(weights(imported), weights(f"hf:{folder}"))
    assert lab.sky("sample", "small", "--prompt", "the cat", "--max-new-tokens", 5).code == 0
    (row,) = json.loads(lab.sky("runs", "--json").out)
    assert (row["state"], row["parameters"]) == ("done", info["parameters"])
    assert sky_core.load(imported)[1].encode("a cat") == tiny_tokenizer().encode("a cat")


def test_a_name_tags_and_plugins_may_be_given(lab: Any, folder: Path) -> None:
    plugin = Path(__file__).with_name("mla_plugin.py")
    assert (
        lab.sky("import", f"hf:{folder}", "--name", "mine", "--tag", "x", "--plugin", plugin, "--out", "new").code == 0
    )
    run = find_run("mine", Path("new"))[0]
    assert run.info["tags"] == ["imported", "x"]
    assert run.config.plugins == [str(plugin.resolve())]


@pytest.mark.parametrize("command", ["resume", "eval"])
def test_without_data_there_is_nothing_to_resume_or_measure(command: str, lab: Any, imported: Path) -> None:
    told = lab.sky(command, imported)
    assert told.code == 2
    assert len(told.errors) == 1
    assert "this run has no data (it was imported, not trained)" in told.errors[0]
    assert lab.info(imported)["state"] == "done"


def test_only_a_local_folder_is_imported(lab: Any) -> None:
    told = lab.sky("import", "gpt2")
    assert (told.code, told.errors) == (2, ["sky: gpt2: what is imported is written hf:DIR, a local folder"])
    assert not Path("runs").exists()


@pytest.mark.parametrize("scheme", ["hf", "run"])
def test_a_run_file_without_a_model_has_that_of_what_it_starts_from(
    scheme: str, lab: Any, folder: Path, imported: Path
) -> None:
    source = f"hf:{folder}" if scheme == "hf" else str(imported)
    tune(lab, init=source, optimizer={"lr": 1e-30}, schedule={"kind": "constant", "warmup": 0}, train=TUNE["train"])
    result = lab.train()
    assert result.state == "done"
    assert lab.info(result.directory)["lineage"] == {"init": source}
    assert same(weights(result.directory), weights(source))
    config = find_run(str(result.directory))[0].config
    assert (config.model.qk_norm, config.model.vocab_size) == ("head", 264)
    assert config.tokenizer.kind == ("huggingface" if scheme == "hf" else "saved")
    # It is a run like any other: longer, measured, and written back.
    assert lab.resume(result.directory, "train.steps=4").step == 4
    assert lab.sky("eval", result.directory).code == 0
    assert lab.sky("export", result.directory, "--hf", "out").code == 0
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "qwen3"


def test_single_options_of_the_model_may_be_changed(lab: Any, folder: Path) -> None:
    tune(lab, init=f"hf:{folder}")
    model = read_run("run.yaml", ["model.kind=init", "model.dropout=0.25"]).model
    assert (model.dropout, model.qk_norm, model.n_layer) == (0.25, "head", 2)
    tune(lab, init=f"hf:{folder}", model="init")
    assert read_run("run.yaml").model.qk_norm == "head"


def test_a_model_that_is_named_is_the_one_that_is_trained(lab: Any, folder: Path) -> None:
    tune(lab, init=f"hf:{folder}", model={"n_layer": 1})
    assert read_run("run.yaml").model.qk_norm is None
    with pytest.raises(UserError, match="it does not fit the model"):
        lab.train()


def test_data_of_another_tokenizer_is_refused(lab: Any, folder: Path) -> None:
    tune(lab, init=f"hf:{folder}", tokenizer="byte")
    with pytest.raises(UserError, match=r"init: .* was trained with tokenizer"):
        lab.train()
    assert not list(Path("runs").glob("*"))


def test_model_init_without_init_is_refused(lab: Any) -> None:
    tune(lab, model="init")
    with pytest.raises(UserError, match="kind init is the model of what the run starts from; name that with init:"):
        read_run("run.yaml")


def test_model_init_of_what_only_a_plugin_reads_is_refused(lab: Any) -> None:
    tune(lab, init="gguf:model", model={"kind": "init", "dropout": 0.1})
    with pytest.raises(UserError, match="gguf:model has is not known before it is read; write it out"):
        read_run("run.yaml")


def test_checking_such_a_run_file_needs_no_torch(lab: Any, folder: Path) -> None:
    tune(lab, init=f"hf:{folder}")
    code = "import sys; from sky_core.config import read_run; read_run('run.yaml'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_is_exported_in_shards_and_in_half_the_bytes(lab: Any, imported: Path) -> None:
    assert lab.sky("export", imported, "--hf", "big").out == "wrote big\n"
    assert lab.sky("export", imported, "--hf", "half", "--dtype", "bfloat16", "--shard-size", "9KB").code == 0
    assert json.loads(Path("half/config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads(Path("half/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] * 2 == sum(
        tensor.nbytes for tensor in sky_core.load("hf:big")[0].parameters()
    )
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights(imported).items()}
    assert same(weights("hf:half"), rounded)
    told = lab.sky("export", imported, "--hf", "big")
    assert (told.code, len(told.errors)) == (2, 1)
    assert lab.sky("export", imported, "--hf", "x", "--shard-size", "5 apples").code == 2


def test_a_model_with_adapters_or_of_another_kind_has_no_such_form(lab: Any, tmp_path: Path) -> None:
    model = Decoder(n_layer=1, n_head=2, d_model=16, max_length=16).build(257)
    model.adapters.append(object())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this model has adapters"):
        sky_core.hf.export(model, tiny_tokenizer(), tmp_path / "out")
    with pytest.raises(UserError, match="a model of class Linear has no Hugging Face form"):
        sky_core.hf.export(torch.nn.Linear(2, 2), tiny_tokenizer(), tmp_path / "out")  # type: ignore[arg-type]
