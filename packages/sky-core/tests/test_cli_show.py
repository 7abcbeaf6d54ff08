"""`sky show`: the code it points at is the code that runs, and its numbers are those of what is built."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sky_core.cli.implementation import implementation
from sky_core.component import Component
from sky_core.model.count import kv_bytes_per_token
from sky_core.plugins import load_plugins
from sky_core.run_directory import RunDirectory
from sky_core.testing.workbench import TEXT, attention_spec, layer_spec, tiny_model, tiny_run, tiny_tokenizer

CORE = [
    component
    for kinds in load_plugins([]).catalog.values()
    for component in kinds.values()
    if component.__module__.startswith("sky_core.components.")
    and (component.slot, component.kind) != ("dataset", "none")
]
"""Core's parts, all but the data of a run that has none."""


def linear() -> Any:
    return torch.nn.Linear(4, 4)


def saved() -> str:
    tiny_tokenizer().save(Path("saved"))
    return "saved"


def prepared(form: str) -> str:
    from sky_core.components.tokenizer import Byte
    from sky_core.data.prepare import prepare
    from sky_core.data.read import Corpus

    Path("corpus.txt").write_text(TEXT * 20)
    prepare(Corpus(["corpus.txt"]), Path(form), Byte(), split="position", validation=0.1, format=form)
    return form


def ranks() -> str:
    from base64 import b64encode

    Path("ranks.tiktoken").write_bytes(b"".join(b"%s %d\n" % (b64encode(bytes([i])), i) for i in range(256)))
    return "ranks.tiktoken"


def exported() -> str:
    from sky_core.tokenizer.huggingface import write_huggingface

    write_huggingface(tiny_tokenizer(), Path("exported"))
    return "exported"


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "bpe": lambda: {"vocab_size": 260},
    "saved": lambda: {"path": saved()},
    "tokens": lambda: {"path": prepared("tokens"), "sequence_length": 16},
    "shards": lambda: {"path": prepared("shards"), "sequence_length": 16},
    "text": lambda: {"path": prepared("tokens") and "corpus.txt", "sequence_length": 16, "split": "position"},
    "mixture": lambda: {
        "members": [{"weight": 1, "data": {"kind": "tokens", "path": prepared("tokens"), "sequence_length": 16}}]
    },
    "fit": lambda: {"steps": 1, "batch_tokens": 16},
    "sentencepiece": lambda: {"vocab_size": 275},
    "tiktoken": lambda: {"path": ranks()},
    "huggingface": lambda: {"path": exported()},
    "domains": lambda: {"path": "texts"},
    "last_word": lambda: {"path": "texts"},
    "cloze": lambda: {"path": "items.jsonl"},
    "minimal_pairs": lambda: {"path": "items.jsonl"},
    "lm_eval": lambda: {"tasks": ["arc_easy"]},
}
"""Options that a kind needs to be built here."""

NEEDS = {"sentencepiece": ["sentencepiece"], "huggingface": ["tokenizers"], "lm_eval": ["lm_eval", "datasets"]}
"""Packages that a kind needs."""

BUILD: dict[str, Callable[[Any], Any]] = {
    "model": lambda part: part.build(16),
    "block": lambda part: part.build(layer_spec(), linear(), linear(), None),
    "attention": lambda part: part.build(attention_spec(torch.nn.Identity())),
    "kernel": lambda part: part.build(),
    "feedforward": lambda part: part.build(layer_spec()),
    "position": lambda part: part.build(32, 8, 16, 4),
    "norm": lambda part: part.build(8),
    "tokenizer": lambda part: part.train([TEXT]),
    "dataset": lambda part: part.build(0, None),
    "objective": lambda part: part.build(tiny_run(), tiny_tokenizer()),
    "optimizer": lambda part: part.build(list(tiny_model(16).named_parameters()))[0],
    "schedule": lambda part: part.build(10),
    "engine": lambda part: part.build(),
    "trainer": lambda part: part.build(tiny_run(train=part), RunDirectory(Path("run"))),
    "callback": lambda part: part.build(None),
    "eval": lambda part: part.build(),
    "sampler": lambda part: part.build(),
}


@pytest.mark.parametrize("component", CORE, ids=lambda component: f"{component.slot}-{component.kind}")
def test_the_implementation_is_what_build_gives(
    component: type[Component], sky_sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NEEDS.get(component.kind, ()):
        pytest.importorskip(package, reason=f"needs {package}")
    name, file, line = implementation(component)
    module, _, attribute = name.rpartition(".")
    meant = getattr(importlib.import_module(module), attribute)
    assert re.match(rf"(class|def) {attribute}\b", file.read_text(encoding="utf-8").splitlines()[line - 1])
    part = component.model_validate(OPTIONS.get(component.kind, dict)())
    built = BUILD[component.slot](part)
    if isinstance(meant, type):
        assert type(built) is meant
    elif built is not meant and getattr(built, "func", None) is not meant:
        assert component.slot in ("optimizer", "schedule", "tokenizer")
        # A function that makes the part: what it returns is the part.
        made: list[Any] = []
        monkeypatch.setattr(f"{module}.{attribute}", lambda *a, **k: made.append(meant(*a, **k)) or made[-1])
        built = BUILD[component.slot](part)
        assert any(built is one for one in made)


def test_every_core_slot_is_looked_at() -> None:
    assert {component.slot for component in CORE} == BUILD.keys()


def test_parts_are_counted_apart_and_the_embedding_is_the_rest(lab: Any) -> None:
    overrides = ("model.n_layer=3", "model.feedforward=[{kind: gelu, d_ff: 8}, swiglu]", "model.position=learned")
    shown = json.loads(lab.sky("show", "run.yaml", *overrides, "--json").out)
    count = {row["path"]: row["parameters"] for row in shown["components"]}
    width, sizes = 16, shown["model"]
    assert count["model.attention"] == 3 * 4 * width * width
    assert count["model.feedforward.0"] == 2 * 2 * width * 8  # layers 0 and 2
    assert count["model.feedforward.1"] == 3 * width * 64
    assert count["model.norm"] == (2 * 3 + 1) * width
    assert count["model.position"] == 16 * width
    assert count["model.kernel"] is count["data"] is None
    parts = sum(number or 0 for path, number in count.items() if path.startswith("model."))
    assert count["model"] == sizes["parameters.total"] == parts + sizes["vocabulary"] * width


def test_parts_of_one_class_take_turns(lab: Any) -> None:
    overrides = ("model.n_layer=3", "model.feedforward=[{kind: gelu, d_ff: 8}, {kind: relu, d_ff: 4}]")
    shown = json.loads(lab.sky("show", "run.yaml", *overrides, "--json").out)
    count = {row["path"]: row["parameters"] for row in shown["components"]}
    assert (count["model.feedforward.0"], count["model.feedforward.1"]) == (2 * 2 * 16 * 8, 2 * 16 * 4)


def test_the_cache_is_that_of_grouped_keys_and_values(lab: Any) -> None:
    shown = json.loads(lab.sky("show", "run.yaml", "model.n_layer=3", "model.n_kv_head=1", "--json").out)
    fp32, bf16 = (kv_bytes_per_token(3, 1, 8, size) for size in (4, 2))
    assert shown["model"]["cache_bytes_per_token"] == {"fp32": fp32, "bf16": bf16}


def test_the_text_is_plain_and_aligned_and_says_the_sizes(lab: Any) -> None:
    told = lab.sky("show", "run.yaml")
    assert "\x1b" not in told.out
    assert max(map(len, (line for line in told.out.splitlines() if "/" not in line))) <= 100
    assert "memory=" not in told.out
    assert "n_kv_head=null" in told.out
    assert re.search(r"^parameters +\S+ \(\S+ body, \S+ embedding\)$", told.out, re.M)
    assert re.search(r"^KV cache +128 bytes per token in fp32, 64 bytes in bf16$", told.out, re.M)
    assert re.search(r"^data\.train +.*tokens, 1 documents, ", told.out, re.M)
    assert "data of kind text" in told.err
    assert "attention kernel" not in told.err


def test_on_a_terminal_there_are_colours_and_no_line_is_too_long(lab: Any) -> None:
    lab.monkeypatch.setenv("FORCE_COLOR", "1")
    lab.monkeypatch.setenv("COLUMNS", "60")
    lab.monkeypatch.delenv("NO_COLOR", raising=False)
    out = lab.sky("show", "run.yaml", "--no-build").out
    assert "\x1b[36m" in out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert all(len(line) <= 60 for line in plain.splitlines() if not re.search(r"sky_core|\.py:", line))


def test_the_datas_own_tokenizer_is_named(lab: Any) -> None:
    from sky_core.components.tokenizer import Byte
    from sky_core.data.prepare import prepare
    from sky_core.data.read import Corpus

    prepare(Corpus(["corpus.txt"]), Path("tokens"), Byte(), split="position", validation=0.1)
    lab.write(tokenizer=None, data={"kind": "tokens", "path": "tokens", "sequence_length": 16})
    out = lab.sky("show", "run.yaml").out
    fingerprint = tiny_tokenizer().fingerprint
    assert re.search(rf"^tokenizer +the data's own: byte, 257 ids, fingerprint {fingerprint}$", out, re.M)
    assert re.search(r"^tokenizer +the data's own$", lab.sky("show", "run.yaml", "--no-build").out, re.M)
    assert json.loads(lab.sky("show", "run.yaml", "--json").out)["model"]["tokenizer"]["fingerprint"] == fingerprint
