"""The arithmetic of `sky bench`: ratios, intervals, exponents, falls; the records it leaves; and that it runs."""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from sky_core.bench import record
from sky_core.bench.compare import fallen, fell
from sky_core.bench.record import Options, Record, repository, source_state, spread
from sky_core.bench.report import Settings, check, finish, markdown, read
from sky_core.bench.shape import find_shape
from sky_core.bench.student import paired, pairs_needed, t_quantile, within
from sky_core.bench.timing import Rounds, interleave
from sky_core.data.shards import ShardTokens
from sky_core.errors import CheckFailed, SkyError, UserError
from sky_core.model.cache import Cache
from sky_core.model.decoder import DecoderLM
from sky_core.model.language_model import LanguageModel

# --------------------------------------------------------------------------------------------- student


@pytest.mark.parametrize(
    ("confidence", "dof", "t"),
    # Tables of Student's t, two-sided: exact for one and two degrees of freedom, four decimals for the others.
    [
        (0.5, 1, 1.0),
        (0.95, 1, math.tan(0.475 * math.pi)),
        (0.95, 2, 0.95 * math.sqrt(2 / (1 - 0.95**2))),
        (0.95, 3, 3.1824),
        (0.95, 4, 2.7764),
        (0.99, 5, 4.0321),
        (0.95, 10, 2.2281),
        (0.90, 11, 1.7959),
        (0.95, 30, 2.0423),
        (0.95, 120, 1.9799),
    ],
)
def test_quantiles_are_those_of_the_tables(confidence: float, dof: int, t: float) -> None:
    assert t_quantile(confidence, dof) == pytest.approx(t, abs=5e-5)


@given(st.floats(0.01, 0.999), st.integers(1, 60))
def test_a_quantile_is_where_the_distribution_has_that_probability(confidence: float, dof: int) -> None:
    assert within(t_quantile(confidence, dof), dof) == pytest.approx(confidence, abs=1e-9)


def test_no_quantile_of_certainty() -> None:
    with pytest.raises(ValueError, match="no quantile"):
        t_quantile(1.0, 3)


def test_an_interval_is_students_and_one_pair_says_nothing() -> None:
    found = paired([-0.02, -0.03, -0.01])
    half = 4.30265 * 0.01 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.02, -0.02 - half, -0.02 + half), abs=1e-6)
    assert found.holds_zero
    assert not paired([-0.02, -0.021, -0.019]).holds_zero
    assert paired([-5.0]).holds_zero


def test_the_pairs_needed_are_the_fewest_that_tell() -> None:
    differences = [-0.02, -0.03, -0.01]
    needed = pairs_needed(differences)
    assert needed is not None

    def half(n: int) -> float:
        return t_quantile(0.95, n - 1) * 0.01 / math.sqrt(n)

    assert half(needed) < 0.02 <= half(needed - 1)
    assert pairs_needed([1.0, -1.0]) is None
    assert pairs_needed([1.0]) is None


# --------------------------------------------------------------------------------------------- timing


def test_contenders_take_turns_and_the_warm_up_does_not_count() -> None:
    turns: list[str] = []
    contenders = {name: (lambda name=name: turns.append(name)) for name in "abc"}
    told: list[tuple[str, int]] = []
    timed = interleave(contenders, 2, warmup=1, progress=lambda *now: told.append(now))
    assert turns == list("abcabcabc")
    assert [turn for _, turn in told] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {name: len(seconds) for name, seconds in timed.seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_ratio_is_of_neighbours_so_a_slow_round_changes_nothing() -> None:
    timed = Rounds({"ours": [1.0, 5.0, 1.1], "theirs": [2.0, 10.0, 2.2], "slow": [9.0, 9.0, 9.0]})
    assert timed.times_faster("ours", "theirs") == pytest.approx([2.0, 2.0, 2.0])
    assert timed.rates("ours", 10) == pytest.approx([10.0, 2.0, 10 / 1.1])
    assert timed.best(["slow", "theirs"]) == "theirs"


# --------------------------------------------------------------------------------------------- comparing


def ratio(values: list[float], what: str = "ours against them", better: str | None = "higher") -> dict[str, Any]:
    return {"what": what, "unit": "times", **spread(values), **({"better": better} if better else {})}


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_planted_fall_is_found_and_a_rise_is_none(better: str) -> None:
    noise = [0.98, 0.99, 1.0, 1.01, 1.02]
    good, bad = (1.5, 1.3) if better == "higher" else (0.7, 0.8)
    base = ratio([good * one for one in noise], better=better)
    assert fell(ratio([bad * one for one in noise], better=better), base)
    assert not fell(base, ratio([bad * one for one in noise], better=better))


def test_noise_is_no_fall() -> None:
    base = ratio([1.40, 1.45, 1.50, 1.55, 1.60])
    assert not fell(ratio([1.34, 1.38, 1.42, 1.47, 1.52]), base)  # within the quartiles' distances
    assert not fell(ratio([1.485]), ratio([1.5]))  # one value each: within two percent
    assert fell(ratio([1.45]), ratio([1.5]))


def test_only_ratios_that_both_records_have_are_compared() -> None:
    base = {"measures": [ratio([2.0]), ratio([5.0], "gone"), ratio([100.0], "speed", None)]}
    new = {"measures": [ratio([1.0]), ratio([5.0], "new"), ratio([10.0], "speed", None)]}
    lines, common = fallen(new, base)
    assert common == 1
    assert lines == ["ours against them: 2 -> 1 times (spread 0 and 0)"]
    with pytest.raises(CheckFailed, match=r"1 of 1 ratios fell since base\.json"):
        check(new, base, "base.json")
    with pytest.raises(UserError, match="no ratio in common"):
        check({"measures": []}, base, "base.json")


def test_a_record_is_held_to_the_one_that_it_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"measures": [ratio([2.0])]}))
    settings = Settings(out=file, smoke=True, compare=file)
    record = Record(settings.options("x"), what="x")
    record.measure("ours against them", 1.0, "times", better="higher")
    with pytest.raises(CheckFailed, match="1 of 1 ratios fell"):
        finish(record, settings)
    assert [measure["value"] for measure in read(file)["measures"]] == [1.0]


# --------------------------------------------------------------------------------------------- exponents


@given(st.floats(0.1, 3.0), st.floats(1e-6, 1e6))
def test_a_planted_exponent_is_recovered(exponent: float, factor: float) -> None:
    from sky_core.bench.scaling import power_law

    xs = [128, 256, 512, 1024]
    law = power_law(xs, [factor * x**exponent for x in xs])
    assert law.exponent == pytest.approx(exponent, abs=1e-9)
    assert law.factor == pytest.approx(factor, rel=1e-6)
    assert law.stderr == pytest.approx(0.0, abs=1e-6)


def test_the_error_of_an_exponent_is_that_of_least_squares() -> None:
    from sky_core.bench.scaling import power_law

    # In logarithms: x = 0, 1, 2 and y = 0, 1.5, 2: slope 1, residuals (-1/6, 1/3, -1/6), so s.e. = √(1/6 / 1 / 2).
    law = power_law([1, math.e, math.e**2], [1, math.e**1.5, math.e**2])
    assert (law.exponent, law.stderr) == pytest.approx((1.0, math.sqrt(1 / 12)))
    assert power_law([1, 2], [1, 8]).stderr is None
    with pytest.raises(ValueError, match="two different sizes"):
        power_law([2, 2], [1, 3])


def test_an_axis_changes_one_size_and_keeps_the_width_of_heads() -> None:
    from sky_core.bench.scaling import points

    base = find_shape(None, smoke=True)
    wide = points(base, 16, 2, "width", (1.0, 2.0))
    assert [point.x for point in wide] == [32, 64]
    assert {point.shape.model.width_of_head for point in wide} == {base.model.width_of_head}
    assert [point.shape.model.feedforward[0].d_ff for point in wide] == [64, 128]
    deep = points(base, 16, 2, "depth", (0.5, 1.0, 1.01))
    assert [(point.x, point.shape.model.n_layer) for point in deep] == [(1, 1), (2, 2)]
    (long,) = points(base, 64, 2, "length", (4.0,))
    assert (long.length, long.shape.model.max_length) == (256, 256)
    (many,) = points(base, 64, 2, "vocabulary", (2.0,))
    assert many.shape.build().embed_tokens.num_embeddings == 2 * 97


# --------------------------------------------------------------------------------------------- records


def test_a_measure_holds_its_quartiles_once_there_are_enough_values() -> None:
    assert "quartiles" not in spread([1.0, 2.0, 3.0])
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0])["quartiles"] == [2.0, 4.0]


def test_a_record_goes_where_it_is_asked_to_and_a_smoke_run_nowhere_else(tmp_path: Path) -> None:
    for out, file in ((tmp_path, tmp_path / "x.json"), (tmp_path / "y.json", tmp_path / "y.json")):
        record = Record(Options("x", out, smoke=True), what="x", peers=["transformers-of-nobody"])
        record.measure("loss", 1.0, "nats")
        record.save(runs=[])
        data = json.loads(file.read_text())
        assert data["versions"]["transformers-of-nobody"] is None
        assert data["versions"]["sky-core"]
    assert Record(Options("x", smoke=True), what="x").path is None


def test_an_environment_inside_a_checkout_is_no_part_of_it(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    source, installed = tmp_path / "src" / "sky_core", tmp_path / "env" / "sky_core"
    for folder in (source, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (tmp_path / ".gitignore").write_text("env\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    assert repository(source) == tmp_path.resolve()
    assert repository(installed) is None
    assert source_state(tmp_path) == {**source_state(tmp_path), "dirty": False, "changed_files": []}


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(UserError, match="no such record"):
        read(file)
    file.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read(file)
    file.write_text("[]")
    with pytest.raises(UserError, match="no record of a benchmark"):
        Settings(compare=file).options("x")


@pytest.mark.parametrize(
    ("command", "name"),
    # First what the committed records are called, then what must not overwrite them.
    [
        ("train --length 512 --batch 4", "train-tiny-T512-bf16"),
        ("decode", "decode-tiny-bf16"),
        ("load", "loading"),
        ("start --compile", "start"),
        ("train --batch 8 --no-compile", "train-tiny-T512-bf16-eager-B8"),
        ("memory --batch 8 --length 64", "memory-tiny-T64-bf16-B8"),
        ("decode --batch 1,8 --no-compile --precision fp32", "decode-tiny-fp32-eager"),
        ("decode --batch 1,4 --prompt 8 --new 32", "decode-tiny-bf16-B1-4-P8-N32"),
        ("decode --requests 5", "requests-tiny-bf16"),
        ("decode --requests 5 --rows 4 --no-compile", "requests-tiny-bf16-eager-R4"),
        ("load --tokens 1000 --length 64", "loading-M1000-T64"),
        ("optimizer", "optimizer-tiny"),
        ("optimizer --no-compile --batch-tokens 8192", "optimizer-tiny-eager-S8192"),
        ("scaling", "scaling-tiny-bf16"),
        ("scaling --compile --axes depth,batch --factors 0.5,1", "scaling-tiny-bf16-compiled-Adepth-batch-F0.5-1"),
    ],
)
def test_a_record_is_called_by_the_sizes_that_are_not_the_default(
    command: str, name: str, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(settings: Settings, name: str) -> Options:
        raise UserError(name)

    monkeypatch.setattr(Settings, "options", told)
    model = {"n_layer": 1, "n_head": 2, "d_model": 32, "max_length": 512, "vocab_size": 97}
    Path("tiny.yaml").write_text(json.dumps({"name": "tiny", "model": model}))
    shape = [] if command.startswith(("load", "start")) else ["--shape", "tiny.yaml"]
    peers = ["--against", "none"] if command.startswith(("train", "memory", "decode")) else []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr("torch.cuda.is_available", lambda device=device: device == "cuda")
        suffix = "-cuda" if device == "cuda" and not command.startswith("load") else ""
        assert lab.sky("bench", *command.split(), *shape, *peers).errors == [f"sky: {name}{suffix}"]


def test_a_table_shows_measures_notes_and_where_they_come_from() -> None:
    data = {
        "name": "x", "what": "speed", "command": "sky bench x", "date": "2026-01-02T03:04:05Z",
        "commit": None, "dirty": False, "machine": {"cpu": "A CPU", "cores": 2, "gpu": "A GPU"},
        "versions": {"python": "3.11", "torch": "2.13", "sky-core": "0.2", "transformers": "5", "gone": None},
        "measures": [ratio([1.5])], "notes": ["not distinguishable"],
    }  # fmt: skip
    text = markdown(data)
    assert "| ours against them | 1.5 times |  |  |  |  |" in text
    assert "\nnot distinguishable\n" in text
    assert "x: A CPU, 2 cores, A GPU, Python 3.11, torch 2.13, transformers 5, sky-core 0.2, 2026-01-02" in text


# --------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def bench(lab: Any) -> Iterator[Any]:
    """`bench("train", ...)`: a smoke run of a sub-command; what it recorded."""

    def run(command: str, *arguments: str) -> dict[str, Any]:
        told = lab.sky("bench", command, "--smoke", "--out", "out", *arguments)
        assert told.code == 0, told.err
        (file,) = Path("out").glob("*.json")
        data = read(file)
        assert file.with_suffix(".md").read_text() == told.out
        assert data["smoke"] is True
        assert data["runs"]
        return data

    logging.getLogger("sky_core").setLevel(logging.WARNING)
    yield run
    logging.getLogger("sky_core").setLevel(logging.NOTSET)


def values(data: dict[str, Any]) -> dict[str, float]:
    return {measure["what"]: measure["value"] for measure in data["measures"]}


def test_training_is_measured_against_the_machine(bench: Any) -> None:
    data = bench("train", "--against", "none", "--no-compile", "--precision", "fp32")
    found = values(data)
    speed, share = found["ours: speed"], found["ours: share of the matrix product"]
    assert share == pytest.approx(speed * data["sizes"]["flops_per_token"] / data["ceilings"]["flops"]["fp32"])
    assert data["losses"]["weights, fp32"]["ours"] == pytest.approx(math.log(97), abs=1.0)


def test_decoding_is_measured_against_the_memory(bench: Any) -> None:
    data = bench("decode", "--against", "none", "--no-compile", "--batch", "2", "--precision", "fp32")
    found = values(data)
    shape = find_shape(None, smoke=True)
    weights = 4 * sum(parameter.numel() for parameter in shape.build().parameters())
    assert data["sizes"]["weight_bytes"] == {"ours, fp32": weights}
    cached = 2 * (4 + 3) * 2 * 2 * 1 * 16 * 4  # rows, tokens at mid-text, keys and values, layers, heads, width, bytes
    limit = 2 * data["ceilings"]["bandwidth"] / (weights + cached)
    share = found["batch 2, ours, fp32: share of the memory's limit"]
    assert share == pytest.approx(found["batch 2, ours, fp32: speed"] / limit)


def test_the_command_of_a_record_names_no_path_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKY_DATA", "/data/of mine")
    words = ["sky", "bench", "--runs", "/some/where/runs", "a=/else/b.txt", "c=/data/of mine/d/e.txt", "out/f", "0.5/2"]
    monkeypatch.setattr("sys.argv", words)
    assert record._command() == "sky bench --runs runs a=b.txt 'c=$SKY_DATA/d/e.txt' out/f 0.5/2"


def test_requests_are_answered_in_full(bench: Any) -> None:
    data = bench("decode", "--against", "none", "--no-compile", "--requests", "5")
    useful = sum(n for _, n in data["sizes"]["requests"])
    (run,) = data["runs"]
    assert values(data)["ours: useful tokens"] == pytest.approx(useful / statistics.median(run["seconds"]))


@pytest.mark.parametrize("what", ["--batch 1,2 --quantize int8", "--requests 5"])
def test_compiled_steps_that_compute_something_else_are_not_timed(
    what: str, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(model: DecoderLM, tokens_B: torch.Tensor, cache: Cache, *, idle: int = 0) -> torch.Tensor:
        return LanguageModel.step(model, tokens_B, cache) * (1 + error * (len(tokens_B) == 2))

    monkeypatch.setattr(DecoderLM, "compile_decoding", lambda model: None)
    monkeypatch.setattr(DecoderLM, "step", planted)
    command = ["bench", "decode", "--smoke", "--against", "none", "--precision", "fp32", *what.split(), "--out", "out"]
    error = 0.0
    assert lab.sky(*command).code == 0
    shutil.rmtree("out")
    error = 1e-3
    told = lab.sky(*command)
    assert told.code == 4
    assert "compiled steps of 2 rows do not compute what uncompiled ones do" in told.errors[-1]
    assert "relative (tolerance 1e-04); nothing was timed" in told.errors[-1]
    assert not Path("out").exists()


def test_the_graphs_that_are_compared_are_those_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sky_core.bench.contenders.ours import Ours

    counter, compile_decoding = CompileCounter(), DecoderLM.compile_decoding
    monkeypatch.setattr(DecoderLM, "compile_decoding", lambda model: compile_decoding(model, backend=counter))
    ours = Ours(find_shape(None, smoke=True).build(), "cpu")
    ours.prepare_decoding("fp32", compile=True, batch=3, length=9)
    for rows in (1, 2, 3):
        # fp32 sums in another order: the operators of few rows against torch's.
        assert ours.error_of_compiled_steps(rows, 4, 9) < 1e-5
    compiled = counter.frame_count
    assert [len(text) for text in ours.generate([[1, 2, 3, 4]] * 3, 5)] == [5, 5, 5]
    assert [len(text) for text in ours.serve([([1, 2, 3], 4), ([4], 2), ([5, 6, 7, 8], 5)], 3)] == [4, 2, 5]
    assert counter.frame_count == compiled == 3


def test_loading_is_measured_against_nanogpt(bench: Any) -> None:
    found = values(bench("load"))
    assert {"token files against nanoGPT", "tar shards against nanoGPT"} <= found.keys()
    for way in ("token files", "tar shards"):
        assert {f"{way}, documents: mask", f"{way}, packing: best_fit", f"{way}, two mixed 7:3"} <= found.keys()


def test_loading_is_not_timed_where_shards_give_other_sequences(lab: Any) -> None:
    gather = ShardTokens.gather
    lab.monkeypatch.setattr(ShardTokens, "gather", lambda self, starts, length: gather(self, starts + 1, length))
    told = lab.sky("bench", "load", "--smoke", "--out", "out")
    assert told.code == 4
    assert "tar shards: its tokens_BT are not those of token files" in told.err
    assert not Path("out").exists()


def test_optimizers_take_their_share_of_a_step(bench: Any) -> None:
    data = bench("optimizer", "--no-compile")
    seconds = {run["what"]: run["seconds"] for run in data["runs"]}
    micro = data["sizes"]["batch_tokens"] / (data["sizes"]["batch"] * data["sizes"]["length"])
    own = zip(seconds["AdamW fused"], seconds["micro-batch"], strict=True)
    expected = statistics.median([step / (step + micro * rest) for step, rest in own])
    assert values(data)["AdamW fused: share of a training step"] == pytest.approx(expected)


def test_a_share_is_of_a_compiled_step_unless_asked_otherwise(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(DecoderLM, "compile_layers", lambda model: compiled.append(type(model)))
    assert bench("optimizer")["sizes"]["compile"] is True
    assert compiled == [DecoderLM]


def test_memory_is_that_of_a_process_of_its_own(bench: Any) -> None:
    data = bench("memory", "--against", "none", "--no-compile")
    (run,) = data["runs"]
    assert 0 < run["base"] < run["peak"]
    assert values(data)["ours: of that for the model"] == pytest.approx((run["peak"] - run["base"]) / 2**20)


def test_scaling_reports_exponents_beside_those_on_paper(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sky_core.bench import memory

    def planted(task: memory.Task) -> memory.Found:
        cost = task.length**2
        return memory.Found(1000, 1000 + 7 * cost, "", 1.0, 100, 6.0 * task.length, "cpu", [3.0 * cost] * 3)

    monkeypatch.setattr(memory, "measure", planted)
    data = bench("scaling", "--axes", "length")
    found = {measure["what"]: measure for measure in data["measures"]}
    time = found["length: exponent of the time, ± one standard error"]
    assert (time["value"], time["peer"]["value"]) == pytest.approx((2.0, 2.0))
    assert found["length: exponent of the memory, ± one standard error"]["value"] == pytest.approx(2.0)


def test_a_start_is_timed_from_the_process_to_the_first_step(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sky_core.bench import start

    monkeypatch.setattr(start, "seconds_to_first_step", lambda folder, out, *overrides: 12.0 if overrides else 2.0)
    monkeypatch.setattr(start, "seconds_to_import_torch", lambda: 0.5)
    found = values(bench("start", "--compile"))
    assert found["seconds to the end of step 1"] == 2.0
    assert found["to the end of step 1"] == 4.0
    assert found["compile time, warm cache"] == 10.0


def test_a_cold_start_finds_no_compiled_code_of_this_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sky_core.bench import start
    from sky_core.compilation import keep_compiled_code
    from sky_core.files import cache_folder

    def fail(command: list[str], *, env: dict[str, str], **_: Any) -> Any:
        for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
            monkeypatch.setenv(name, env[name])
        return subprocess.CompletedProcess(command, 1, "", "stopped")

    for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "of the user"))
    monkeypatch.setattr("subprocess.run", fail)
    with pytest.raises(SkyError, match="stopped"):
        start.seconds_to_first_step(tmp_path / "start", "cold")
    for folder in (cache_folder("native"), Path(keep_compiled_code())):
        assert folder.is_relative_to(tmp_path / "start")


def test_the_first_step_of_a_run_is_when_its_metrics_say(lab: Any) -> None:
    from sky_core.bench.start import first_step
    from sky_core.run_directory import RunDirectory

    directory = RunDirectory.open(lab.train("train.steps=2").directory)
    assert first_step(directory) == directory.metrics()[0]["time"]


def test_recipes_are_compared_seed_by_seed(lab: Any) -> None:
    lab.write(train={"dry_run": False})
    Path("other.yaml").write_text("extends: run.yaml\noptimizer: {lr: 1.0e-6}\n")
    command = ["bench", "recipe", "run.yaml", "other.yaml", "--seeds", "2", "--tokens", "512", "--allow-dirty"]
    told = lab.sky(*command, "--out", "out")
    assert told.code == 0, told.err
    (file,) = Path("out").glob("recipe-run-other*.json")
    data = read(file)
    assert data["seeds"] == [1337, 1338]
    assert {run["tokens"] for run in data["runs"]} == {512}
    losses = {(run["recipe"], run["seed"]): run["bits_per_byte"] for run in data["runs"]}
    differences = [losses["other", seed] - losses["run", seed] for seed in data["seeds"]]
    assert values(data)["other - run, 512 tokens"] == pytest.approx(statistics.median(differences))
    (note,) = data["notes"]
    assert f"mean {statistics.fmean(differences):+.4f}" in note
    assert "95% interval" in note


def test_a_warm_up_may_be_longer_than_the_steps_that_tell_the_speed(lab: Any) -> None:
    from sky_core.bench.recipe import CALIBRATION_STEPS

    lab.write(train={"dry_run": False}, schedule={"kind": "wsd", "warmup": CALIBRATION_STEPS + 1})
    Path("other.yaml").write_text("extends: run.yaml\noptimizer: {lr: 1.0e-6}\n")
    # Enough for a hundred steps of this model, more than the warm-up takes.
    seldom = ["eval.every=9999", "checkpoint.every=null", "log.every=9999"]
    command = ["bench", "recipe", "run.yaml", "other.yaml", *seldom, "--minutes", "0.01"]
    told = lab.sky(*command, "--smoke", "--out", "out")
    assert told.code == 0, told.err
    (file,) = Path("out").glob("*.json")
    assert {run["recipe"] for run in read(file)["runs"]} == {"run", "other"}


def test_recipes_that_do_the_same_are_not_distinguishable() -> None:
    from sky_core.bench.recipe import verdict

    assert "not distinguishable" in verdict([0.01, -0.02, 0.005], 0.95)
    assert "more seeds" in verdict([0.01, -0.002, 0.005], 0.95)
    assert verdict([-0.02, -0.021, -0.019], 0.95).endswith("lower")
    assert verdict([-0.02], 0.95) == "one seed says nothing of the spread"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--against", "transfomers"], "--against transfomers: no such peer; did you mean 'transformers'?"),
        (
            ["train", "--against", "none", "--shape", "sky-51m"],
            "--shape sky-51m: no recipes/models/sky-51m.yaml in",
        ),
        (["train", "--against", "none", "--compare", "gone.json"], "gone.json: no such record"),
        (["decode", "--batch", "1,x"], "Invalid value for '--batch': '1,x' is no list of positive numbers such as 1,8"),
        (["decode", "--quantize", "int3", "--against", "none"], "--quantize int3: no such format; use int8, int4"),
        (["scaling", "--axes", "depth,color"], "--axes color: no such axis; use length, width, depth"),
        (["recipe", "run.yaml", "--tokens", "9"], "a comparison needs two recipes at least"),
        (["recipe", "run.yaml", "other.yaml"], "say how long: --tokens N, --minutes M, or both"),
        (["compare", "gone.json", "gone.json"], "gone.json: no such record"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(lab: Any, arguments: list[str], line: str) -> None:
    smoke = [] if arguments[0] in ("compare",) else ["--smoke"]
    told = lab.sky("bench", *arguments, *smoke)
    assert told.code == 2
    assert told.errors[-1].startswith(f"sky: {line}")


def test_a_fall_is_exit_code_4(lab: Any) -> None:
    for name, value in (("new", 1.0), ("base", 2.0)):
        Path(f"{name}.json").write_text(json.dumps({"measures": [ratio([value])]}))
    told = lab.sky("bench", "compare", "new.json", "base.json")
    assert (told.code, told.errors) == (4, ["sky: 1 of 1 ratios fell since base.json by more than their spread"])
    assert lab.sky("bench", "compare", "base.json", "new.json").code == 0
