"""Compiled layers: how many graphs there are, when none is made any more, and what a run tells of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from sky_core import native
from sky_core.compilation import CACHE, Compilation, keep_compiled_code
from sky_core.model.language_model import LanguageModel
from sky_core.testing.workbench import assert_close, tiny_model

# Dynamo looks at `.grad` of what enters a layer, which is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

VOCAB = 41
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixture": {"feedforward": {"kind": "moe", "n_experts": 4, "top_k": 2, "d_ff": 16, "aux_loss": 0.1}},
    "windows and alibi": {"attention": {"kind": "full", "window": 5}, "position": "alibi"},
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(**options: Any) -> tuple[LanguageModel, list[Any]]:
    """A model of five layers, and the graphs compiled for it, as they come: in training also that of the loss."""
    graphs: list[Any] = []
    model = tiny_model(VOCAB, n_layer=5, **options).train()
    model.compile_layers(backend=lambda graph, _: graphs.append(graph) or graph)
    return model, graphs


def train(model: LanguageModel, rows: int, **options: Any) -> list[torch.Tensor]:
    """Gradients of a pass."""
    collect: dict[str, Any] = {}
    tokens_BT = torch.randint(VOCAB, (rows, 16), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    total = model.nll(model.hidden(tokens_BT, collect=collect, **options), tokens_BT)
    (total + sum(collect["losses"].values())).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def evaluate(model: LanguageModel, rows: int, tokens: int = 16) -> None:
    model.eval()
    with torch.no_grad():
        model.hidden(torch.zeros(rows, tokens, dtype=torch.long))
    model.train()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_equal_layers_are_one_graph_in_training_and_one_in_evaluation(options: dict[str, Any], packed: bool) -> None:
    model, graphs = compiled(**options)
    documents_BT = torch.arange(16).div(5, rounding_mode="floor").expand(4, -1).clone() if packed else None
    for _ in range(2):
        train(model, 4, documents_BT=documents_BT)
    assert len(graphs) == 2
    for _ in range(2):
        evaluate(model, 4)
    assert len(graphs) == 3
    train(model, 4, documents_BT=documents_BT)
    assert len(graphs) == 3


def test_no_other_shape_of_an_evaluation_is_compiled() -> None:
    model, graphs = compiled()
    train(model, 4)
    evaluate(model, 8)
    for rows, tokens in ((3, 16), (1, 16), (8, 5), (8, 16)):
        evaluate(model, rows, tokens)
    assert len(graphs) == 3


@pytest.mark.parametrize("policy", ["selective", "block"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_recomputing_in_compiled_layers_is_one_graph_and_the_same_gradient(
    options: dict[str, Any], policy: str
) -> None:
    model, graphs = compiled(**options)
    plain = tiny_model(VOCAB, n_layer=5, **options).train()
    model.activation_checkpointing = policy  # type: ignore[assignment]
    for _ in range(2):
        gradients = train(model, 4)
    assert len(graphs) == 2
    for gradient, expected in zip(gradients, train(plain, 4), strict=True):
        assert_close(gradient, expected)


def test_compiled_selective_layers_keep_less() -> None:
    def kept(policy: str) -> int:
        torch._dynamo.reset()
        model = tiny_model(VOCAB, d_model=64).train()
        model.activation_checkpointing = policy  # type: ignore[assignment]
        model.compile_layers(backend="aot_eager_decomp_partition")
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
            model.hidden(torch.zeros(4, 32, dtype=torch.long))
        return sum({x.data_ptr(): x.nbytes for x in saved if not isinstance(x, torch.nn.Parameter)}.values())

    assert kept("selective") < 0.8 * kept("none")


@pytest.mark.parametrize("attention", ["torch's", "our own"])
def test_compiled_selective_layers_compute_no_attention_twice(attention: str) -> None:
    model = tiny_model(VOCAB, d_model=64).train()
    if attention == "our own":
        if not native.has("avx512_bf16"):
            pytest.skip("this CPU does not multiply bf16 (AVX512_BF16)")
        model.use_operators()
    model.activation_checkpointing = "selective"
    computed: list[int] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        computed.append(sum("flash" in name and "backward" not in name for name in names))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    model.compile_layers(backend=backend)
    tokens_BT = torch.zeros(4, 32, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(tokens_BT).sum().backward()
    assert computed == [1, 0], "in the forward and in the backward graph of a layer"


def test_what_was_compiled_is_counted_since_any_moment() -> None:
    before = Compilation.so_far()
    model, _ = compiled()
    train(model, 2)
    new = Compilation.so_far().since(before)
    assert new.graphs == 2  # of a layer and of the loss
    assert new.seconds > 0
    assert str(new).startswith(f"layers compiled in {new.seconds:.1f} s (2 graphs")
    assert Compilation.so_far().since(before) == new


def test_compiled_code_is_kept_in_the_users_cache_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE, "/elsewhere")
    assert keep_compiled_code() == "/elsewhere"
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_compiled_code() == os.environ[CACHE] == str(tmp_path / "sky" / "inductor")
    monkeypatch.setenv(CACHE, default_cache_dir())  # what inductor leaves there once it was asked
    assert keep_compiled_code() == os.environ[CACHE] == str(tmp_path / "sky" / "inductor")


def test_a_run_says_what_it_compiled_and_its_averages_do_not_hold_it(lab: Any) -> None:
    from sky_core.model.decoder import DecoderLM
    from sky_core.run_directory import RunDirectory

    lab.monkeypatch.setenv(CACHE, str(lab.folder / "cache"))
    compile_layers = DecoderLM.compile_layers
    lab.monkeypatch.setattr(DecoderLM, "compile_layers", lambda model: compile_layers(model, backend="eager"))
    run = lab.train("train.compile=true", "eval.every=6").directory
    events = [event for event in RunDirectory(run).events() if event["event"] == "compiled"]
    assert [(event["step"], event["graphs"]) for event in events] == [(1, 2), (6, 1)]
    assert all(event["seconds"] > 0 for event in events)
    assert f"layers compiled in {events[0]['seconds']:.1f} s (2 graphs" in (run / "log.txt").read_text()
    assert lab.metrics(run)[1]["loss"] == pytest.approx(lab.metrics(lab.train("eval.every=6").directory)[1]["loss"])
