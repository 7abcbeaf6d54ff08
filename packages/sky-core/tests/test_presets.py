"""Model presets: the published sizes, their reading, what `sky show` counts of them, and runs that extend them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sky_core.cli.sizes import measure
from sky_core.config import Preset, Run, read_run, read_run_or_preset
from sky_core.errors import ConfigError
from sky_core.model.count import flops_per_token
from sky_core.training.groups import is_hidden_matrix

FOLDER = Path(__file__).parents[3] / "recipes" / "models"
MLA = f"plugins=[{Path(__file__).with_name('mla_plugin.py')}]"
"""Stands in for the plugin that brings DeepSeek-V3's attention."""

PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "pythia-160m": 162_322_944,
    "gpt-neox-20b": 20_554_567_680,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmo2-7b": 7_298_617_344,
    "gemma-2-2b": 2_614_341_888,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_404_352,
}

OURS = {
    "sky-10m": ((8, 4, 2, 256, 704), 8192, 54),
    "sky-25m": ((10, 6, 2, 384, 1024), 16384, 156),
    "sky-50m": ((14, 8, 4, 512, 1408), 16384, 342),
    "sky-100m": ((20, 10, 5, 640, 1728), 16384, 687),
}
"""(layers, heads, key/value heads, width, hidden units), vocabulary, millions of FLOPs for each token."""

pytestmark = pytest.mark.usefixtures("sky_sandbox")


def preset(name: str, *overrides: str) -> Preset:
    read = read_run_or_preset(FOLDER / f"{name}.yaml", [*([MLA] if name == "deepseek-v3" else []), *overrides])
    assert isinstance(read, Preset)
    return read


@cache
def sizes(name: str, *overrides: str) -> dict[str, Any]:
    return measure(preset(name, *overrides))


def to_train(measured: dict[str, Any], engine: str = "local", precision: str = "fp32", processes: int = 1) -> int:
    asked = (engine, precision, processes)
    return next(
        row["bytes"]
        for row in measured["bytes_to_train"]
        if (row["engine"], row["precision"], row["processes"]) == asked
    )


# ------------------------------------------------------------------------------------------------ the presets


def test_every_preset_is_held_to_a_number() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == PARAMETERS.keys() | OURS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_the_published_number_of_parameters_and_its_own_name(name: str) -> None:
    assert preset(name).name == name
    assert sizes(name)["parameters.total"] == PARAMETERS[name]


@pytest.mark.parametrize("name", OURS)
def test_our_own_sizes_are_those_of_their_shapes(name: str) -> None:
    (layers, heads, kv_heads, width, ff), vocabulary = OURS[name][0], OURS[name][1]
    head = width // heads
    layer = 2 * width * width + 2 * width * kv_heads * head + 3 * width * ff + 2 * width + 2 * head
    counted = sizes(name)
    assert counted["parameters.embedding"] == vocabulary * width
    assert counted["parameters.body"] == layers * layer + width
    assert counted["parameters.total"] == counted["parameters.body"] + counted["parameters.embedding"]
    assert round(counted["flops_per_token"] / 1e6) == OURS[name][2]


@pytest.mark.parametrize("name", OURS)
def test_comments_say_the_size_and_what_to_start_from(name: str) -> None:
    counted, comment = sizes(name), (FOLDER / f"{name}.yaml").read_text()
    total, body = (f"{counted[f'parameters.{part}'] / 1e6:.1f}M" for part in ("total", "body"))
    assert f"{total} parameters, {body} of them in the body. 20 tokens for each parameter: " in comment
    assert f"each parameter: {counted['tokens_for_20_per_parameter'] / 1e9:.2f}B." in comment
    scale = counted["parameters.total"] / 108e6  # OLMo-core's ladder
    rate, batch = 0.0047 * scale ** (-1 / 3) / 2, 2048 * 160 * scale ** (2 / 3)
    assert f"Learning rate {rate * 1e3:.1f}e-3 and {batch / 1e3:.0f}k tokens a batch" in comment


@pytest.mark.parametrize(
    ("name", "billions"), [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3), ("deepseek-v3", 37.6), ("llama-3-8b", 8.0)]
)
def test_active_parameters_are_those_that_the_papers_give(name: str, billions: float) -> None:
    counted = sizes(name)
    assert counted["parameters.active"] / 1e9 == pytest.approx(billions, abs=0.06)
    assert counted["tokens_for_20_per_parameter"] == 20 * counted["parameters.active"]


def test_attention_that_core_lacks_is_one_clear_line_until_a_plugin_brings_it(lab: Any) -> None:
    told = lab.sky("show", FOLDER / "deepseek-v3.yaml")
    assert (told.code, told.out) == (2, "")
    assert len(told.err.splitlines()) == 1
    assert "deepseek-v3.yaml:13: model.attention: no attention called 'mla' (have: full" in told.err
    # The layer that stands in for it here keeps the keys and values of each head, not the latent.
    assert sizes("deepseek-v3")["cache_bytes_per_token"]["bf16"] == 61 * 128 * (128 + 64 + 128) * 2


# ------------------------------------------------------------------------------------------------ counting


def test_flops_leave_out_the_experts_that_a_token_does_not_pass() -> None:
    small = ("model.n_layer=2", "model.d_model=64", "model.vocab_size=50", "model.max_length=8", "model.n_head=32")
    few, many = (sizes("mixtral-8x7b", *small, f"model.feedforward.n_experts={n}") for n in (4, 16))
    more_routing = 6 * 2 * 64 * 12  # the router has a row for each expert
    assert many["flops_per_token"] - few["flops_per_token"] == more_routing
    assert many["parameters.active"] - few["parameters.active"] == 2 * 64 * 12


@pytest.mark.parametrize("window", [1, 7, 63, 64, 1000, None])
def test_a_window_bounds_what_a_token_is_counted_to_see(window: int | None) -> None:
    from sky_core.model.mask import Mask

    length, width = 64, 8
    mask = Mask(causal=True) if window is None else Mask(causal=True).with_window(window)
    seen = mask.dense(length, length, torch.device("cpu")).sum().item() / length
    counted = flops_per_token(0, 0, 1, width, length, [window, window]) / (2 * 12 * width)
    assert abs(counted - seen) <= 0.5  # the formula's T / 2 for (T + 1) / 2


def test_the_windows_of_a_models_layers_count() -> None:
    windowed, full = sizes("mistral-7b"), sizes("mistral-7b", "model.attention.window=null")
    unseen = 32768 / 2 - 4096 * (1 - 4096 / (2 * 32768))
    assert full["flops_per_token"] - windowed["flops_per_token"] == pytest.approx(12 * 4096 * 32 * unseen)


def test_windows_bound_what_is_seen_of_the_cache() -> None:
    counted = sizes("gemma-2-2b")
    context = counted["cache_bytes_of_context"]["bf16"]
    assert context == 8192 * counted["cache_bytes_per_token"]["bf16"] == 8192 * 26 * 2 * 4 * 256 * 2
    assert counted["cache_bytes_in_windows"]["bf16"] == context * 3 // 4  # half of the layers see half of it


@pytest.mark.parametrize("fused", ["auto", "false"])
def test_adamw_keeps_eight_bytes_of_each_parameter(fused: str) -> None:
    counted = sizes("sky-10m", "optimizer.kind=adamw", f"optimizer.fused={fused}")
    assert counted["optimizer_bytes"] == 8 * counted["parameters.total"]
    assert to_train(counted) == 16 * counted["parameters.total"]
    assert counted["weights_bytes"] == 4 * counted["parameters.total"]


def test_muon_keeps_four_bytes_of_hidden_matrices_and_eight_of_the_rest() -> None:
    counted = sizes("sky-10m", "optimizer=muon")
    with torch.device("meta"):
        model = preset("sky-10m").model.build(8192)
    named = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    hidden = sum(parameter.numel() for name, parameter in named.items() if is_hidden_matrix(name, parameter))
    assert 0 < hidden < counted["parameters.body"]
    assert counted["optimizer_bytes"] == 8 * counted["parameters.total"] - 4 * hidden


def test_autocast_keeps_a_bf16_copy_of_the_bodys_matrices_until_the_backward_pass() -> None:
    small = preset("sky-10m", "model.n_layer=2", "tokenizer.vocab_size=300")
    model = small.model.build(300)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        # Ten tokens: whatever is as large as a matrix of weights is one.
        if tensor.dtype == torch.bfloat16 and tensor.numel() >= 128 * 256:
            kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    tokens_BT = torch.randint(300, (1, 10))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.nll(model.hidden(tokens_BT), tokens_BT)
    counted = measure(small)
    said = to_train(counted, precision="bf16") - to_train(counted)
    assert said == 2 * counted["parameters.body"]
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert sum(kept.values()) == said - 2 * vectors


ENGINES = """
from sky_core import hookimpl, slots
sky_api = 2

class Sharded(slots.Engine):
    '''Shards gradients and state, not weights.'''
    kind = "sharded"
    def build(self): ...
    def memory(self, parameters, state_bytes, precision, processes):
        return 4 * parameters["total"] + (4 * parameters["total"] + state_bytes) // processes

class Choosy(Sharded):
    '''Cannot be had without options.'''
    kind = "choosy"
    stage: int

class Reader(slots.Optimizer):
    '''Looks at the numbers of a gradient.'''
    kind = "reader"
    def build(self, named_parameters, lr_scale={}):
        import torch
        class Built(torch.optim.SGD):
            def step(self):
                self.param_groups[0]["params"][0].grad.sum().item()
        return [Built([parameter for _, parameter in named_parameters])]

@hookimpl
def sky_engines():
    return [Sharded, Choosy]

@hookimpl
def sky_optimizers():
    return [Reader]
"""


def test_engines_of_plugins_say_what_each_process_holds(lab: Any) -> None:
    Path("engines.py").write_text(ENGINES)
    plugin = f"plugins=[{Path('engines.py').resolve()}]"
    counted = sizes("sky-10m", plugin)
    total = counted["parameters.total"]
    assert {row["engine"] for row in counted["bytes_to_train"]} == {"local", "sharded"}
    assert to_train(counted, "sharded", processes=8) == 4 * total + 12 * total // 8
    assert [row["processes"] for row in counted["bytes_to_train"] if row["engine"] == "local"] == [1, 1]
    out = lab.sky("show", FOLDER / "sky-10m.yaml", plugin).out
    assert "sharded: 122M in fp32, 122M in bf16 to train\n" in out
    assert "sharded: 42M in fp32, 42M in bf16 to train on each of 8\n" in out


def test_what_is_not_known_before_it_runs_is_said_to_be_unknown(lab: Any) -> None:
    Path("engines.py").write_text(ENGINES)
    told = lab.sky("show", FOLDER / "sky-10m.yaml", f"plugins=[{Path('engines.py').resolve()}]", "optimizer=reader")
    assert "memory             to train: not known before it runs" in told.out


def test_an_average_of_the_weights_is_four_bytes_more(lab: Any) -> None:
    counted, averaged = (
        json.loads(lab.sky("show", "run.yaml", *more, "--json").out)["model"] for more in ([], ["train.ema=0.99"])
    )
    assert to_train(averaged) == to_train(counted) + 4 * counted["parameters.total"]


# ------------------------------------------------------------------------------------------------ the command line


def test_a_preset_is_shown_and_checked_by_itself(lab: Any) -> None:
    told = lab.sky("check", FOLDER / "llama-3.1-8b.yaml")
    assert (told.code, told.out) == (
        0,
        f"{FOLDER / 'llama-3.1-8b.yaml'}: a model preset, to be extended, fine (8 components)\n",
    )
    out = lab.sky("show", FOLDER / "llama-3.1-8b.yaml").out
    assert "tokenizer          of 128,256 ids\n" in out
    assert '"original_length": 8192' in out
    assert "KV cache           256K per token in fp32, 128K in bf16\n" in out
    assert "                   16.0G for the whole context in bf16\n" in out
    assert "tokens             161G for 20 per parameter: 2.4e+22 FLOPs of training\n" in out
    assert "12.9G of them active for a token" in lab.sky("show", FOLDER / "mixtral-8x7b.yaml").out


def test_the_json_of_a_preset_reads_back_as_the_preset(lab: Any) -> None:
    shown = json.loads(lab.sky("show", FOLDER / "gemma-2-2b.yaml", "--json", "--no-build").out)
    Path("again.yaml").write_text(json.dumps(shown["preset"]))
    assert read_run_or_preset("again.yaml") == preset("gemma-2-2b")
    assert shown["model"] == {}


def test_the_vocabulary_can_be_overridden() -> None:
    wider = sizes("gpt2-124m", "model.vocab_size=50304")
    assert wider["parameters.total"] == PARAMETERS["gpt2-124m"] + (50304 - 50257) * 768
    assert sizes("sky-10m", "tokenizer.vocab_size=4096")["parameters.embedding"] == 4096 * 256


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_file_extends_a_preset_by_data_and_training_alone(lab: Any) -> None:
    Path("mine.yaml").write_text(
        f"extends: {FOLDER / 'sky-10m.yaml'}\n"
        "name: mine\n"
        "data: {kind: text, path: corpus.txt, sequence_length: 16, split: position}\n"
        "train: {steps: 1, batch_tokens: 64}\n"
    )
    run = read_run_or_preset("mine.yaml")
    assert isinstance(run, Run)
    assert run == read_run("mine.yaml")
    assert (run.name, run.model, run.tokenizer) == ("mine", preset("sky-10m").model, preset("sky-10m").tokenizer)
    # A corpus this small has fewer merges than asked for; another tokenizer brings its own number of ids.
    small = lab.sky("show", "mine.yaml", "tokenizer={kind: byte}", "--json")
    assert json.loads(small.out)["model"]["parameters.embedding"] == 257 * 256


def test_a_preset_is_not_trained(lab: Any) -> None:
    told = lab.sky("train", FOLDER / "sky-10m.yaml")
    assert told.code == 2
    assert [line.rpartition("yaml: ")[2] for line in told.errors] == [
        "data: this key is needed",
        "train: this key is needed",
    ]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            "model: {n_layr: 2, vocab_size: 50}\ntokeniser: byte\n",
            [
                "bad.yaml:1: model.n_layr: unknown key; did you mean 'n_layer'?",
                "bad.yaml:2: tokeniser: unknown key; did you mean 'tokenizer'?",
            ],
        ),
        ("model: {n_layer: 2}\n", ["a preset has no data to learn its vocabulary from: set model.vocab_size"]),
        (
            "model: {vocab_size: 100}\ntokenizer: {kind: bpe, vocab_size: 300}\n",
            ["model.vocab_size: 100 rows cannot hold the tokenizer's 300 ids"],
        ),
        (
            "model: {d_model: 100, n_head: 8, vocab_size: 50}\n",
            ["d_model 100 is not a multiple of n_head 8: use d_model 104, or set head_dim"],
        ),
        (
            "model: {vocab_size: 50, feedforward: {kind: moe, n_experts: 6, n_groups: 4}}\n",
            ["6 experts do not divide over 4 groups: set n_groups to one of 1, 2, 3, 6"],
        ),
        ("model: {vocab_size: 50}\neval: {every: 3}\n", ["data: this key is needed", "train: this key is needed"]),
        ("model: {vocab_size: 50}\nplugins: [no_such]\n", ["no_such"]),
    ],
    ids=["typos", "no vocabulary", "too few rows", "heads", "groups", "a run without data", "plugin"],
)
def test_a_wrong_preset_is_told_like_a_wrong_run_file(lab: Any, text: str, problems: list[str]) -> None:
    Path("bad.yaml").write_text(text)
    for command in ("check", "show"):
        told = lab.sky(command, "bad.yaml")
        assert (told.code, told.out) == (2, "")
        assert len(told.errors) == len(problems)
        assert all(problem in line for problem, line in zip(problems, told.errors, strict=True))


def test_a_tokenizer_that_names_its_size_is_vocabulary_enough() -> None:
    Path("fine.yaml").write_text("model: {n_layer: 1}\ntokenizer: {kind: bpe, vocab_size: 300}\n")
    assert measure(read_run_or_preset("fine.yaml"))["vocabulary"] == 300
    with pytest.raises(ConfigError, match=r"set model\.vocab_size"):
        read_run_or_preset("fine.yaml", ["tokenizer=char"])
