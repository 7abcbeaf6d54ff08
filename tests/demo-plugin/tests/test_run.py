"""sky-demo as its user meets it: a run file that names its parts, then its command."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from sky_core import api
from sky_core.cli.main import main
from sky_core.plugins import loaded_plugins
from sky_demo.commands import bars

RUN = """
plugins: [demo]
model: {n_layer: 2, n_head: 2, d_model: 16, max_length: 64, attention: [{kind: linear, chunk: 8}, full]}
tokenizer: byte
data: {kind: text, path: corpus.txt, split: position, validation: 0.2, sequence_length: 16}
objective: {kind: z_loss, coefficient: 1e-3}
train: {steps: 5, batch_tokens: 64, precision: fp32}
log: {every: 1}
"""


@pytest.fixture
def run_file(sky_sandbox: Path) -> Path:
    if not any(point.name == "demo" for point in entry_points(group="sky")):
        pytest.skip("sky-demo is not installed")
    (sky_sandbox / "corpus.txt").write_text("the cat sat on the mat and looked at the dog. " * 40, encoding="utf-8")
    (sky_sandbox / "run.yaml").write_text(RUN, encoding="utf-8")
    return sky_sandbox / "run.yaml"


def test_a_run_trains_with_its_parts_and_its_command_reads_the_run(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = api.train(run_file)
    assert (result.state, result.step) == ("done", 5)
    assert result.directory.is_dir()
    assert {plugin.name: plugin.status for plugin in loaded_plugins().plugins} == {"core": "active", "demo": "active"}

    with pytest.raises(SystemExit) as stopped:
        main(["demo", "curve", str(result.directory), "--json"])
    assert not stopped.value.code
    points = json.loads(capsys.readouterr().out)
    assert [point["step"] for point in points] == [1, 2, 3, 4, 5]
    assert points[-1]["loss"] < points[0]["loss"]

    model, tokenizer = api.load(result.directory)
    assert type(model.layers[0].self_attn).__name__ == "LinearAttention"
    assert len(api.generate(model, tokenizer, "the", max_new_tokens=5)) > 0


def test_a_misspelt_option_is_found_before_anything_runs(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(run_file), "objective.coeficient=1"])
    assert stopped.value.code == 2
    assert "objective.coeficient: unknown key; did you mean 'coefficient'?" in capsys.readouterr().err


def test_bars_span_the_values() -> None:
    assert bars([3.0, 2.0, 1.0]) == "█▅▁"
    assert bars([1.0, 1.0]) == "▁▁"
