"""Checkpoints in Hugging Face's format: our own come back, and what we cannot compute is refused in one line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sky_core
import sky_core.hf
from sky_core.components.model import Decoder
from sky_core.errors import CheckpointError, SkyError, UserError
from sky_core.hf.architectures import ARCHITECTURES
from sky_core.hf.fit import choose
from sky_core.hf.keys import plan
from sky_core.hf.read import read
from sky_core.model.language_model import LanguageModel
from sky_core.plugins import load_plugins
from sky_core.testing.workbench import tiny_tokenizer
from sky_core.tokenizer.byte import ByteTokenizer

pytest.importorskip("tokenizers", reason="Hugging Face tokenizers need it")

SIZE = {"n_layer": 3, "n_head": 4, "d_model": 16, "max_length": 32}
GROUPED = {**SIZE, "n_kv_head": 2}
CAPPED = {"kind": "full", "softcap": 5.0, "scale": 24**-0.5}
BIASED = {"kind": "full", "bias": True}
MOE = {"kind": "moe", "n_experts": 4, "d_ff": 8}

MLA = {"kind": "mla", "kv_lora_rank": 6, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 3}
GROUPS = {**MOE, "router": "sigmoid", "n_groups": 2, "n_shared": 1, "dense_layers": 1, "d_ff_dense": 12}

MODELS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        GROUPED,
        {**SIZE, "tie_embeddings": False, "bias": True, "vocab_size": 300},
        {**SIZE, "head_dim": 6, "position": {"kind": "rope", "scaling": {"kind": "linear", "factor": 2.0}}},
        {**SIZE, "feedforward": {"kind": "geglu", "approximate": "tanh"}, "dropout": 0.1},
    ],
    "mistral": [{**GROUPED, "attention": {"kind": "full", "window": 8}}],
    "qwen2": [{**GROUPED, "attention": BIASED}, {**SIZE, "attention": [{**BIASED, "window": 8}, BIASED, BIASED]}],
    "qwen3": [{**GROUPED, "qk_norm": "head"}],
    "olmo2": [{**GROUPED, "qk_norm": "full", "block": "reordered", "norm": {"kind": "rmsnorm", "eps": 1e-5}}],
    "gemma2": [
        {
            **GROUPED,
            "block": "sandwich",
            "scale_embeddings": True,
            "logit_softcap": 9.0,
            "attention": [{**CAPPED, "window": 4}, CAPPED],
            "feedforward": {"kind": "geglu", "approximate": "tanh"},
            "norm": {"kind": "rmsnorm", "gain": "zero"},
        }
    ],
    "gpt2": [{**SIZE, "bias": True, "position": "learned", "norm": "layernorm", "feedforward": "gelu"}],
    "gpt_neox": [
        {
            **SIZE,
            "bias": True,
            "block": block,
            "norm": "layernorm",
            "feedforward": {"kind": "gelu", "approximate": "tanh"},
            "position": {"kind": "rope", "fraction": 0.5},
        }
        for block in ("parallel", "pre")
    ],
    "mixtral": [{**GROUPED, "feedforward": MOE}],
    "qwen3_moe": [{**GROUPED, "qk_norm": "head", "feedforward": [{"kind": "swiglu", "d_ff": 24}, MOE, MOE]}],
    "deepseek_v3": [
        {
            **SIZE,
            "head_dim": 4,
            "attention": MLA,
            "feedforward": GROUPS,
            "position": {"kind": "rope", "interleaved": True},
        }
    ],
}


@pytest.fixture(autouse=True)
def _plugins(sky_sandbox: Path) -> None:
    load_plugins([str(Path(__file__).with_name("mla_plugin.py"))])


def built(options: dict[str, Any]) -> LanguageModel:
    """A seeded model over the bytes, no weight at its initial value."""
    torch.manual_seed(0)
    model = Decoder.model_validate(options).build(tiny_tokenizer().vocab_size)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """checkpoint("llama"): the folder of a small model of that architecture."""

    def make(architecture: str = "llama", number: int = 0) -> Path:
        return sky_core.hf.export(built(MODELS[architecture][number]), tiny_tokenizer(), tmp_path / "checkpoint")

    return make


def change(folder: Path, **values: Any) -> None:
    """Write other values into config.json; ... leaves a key out."""
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_there_is_a_model_for_every_architecture() -> None:
    assert MODELS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    ("model_type", "number"), [(name, i) for name, models in MODELS.items() for i in range(len(models))]
)
@torch.no_grad()
def test_a_model_finds_its_architecture_and_comes_back(model_type: str, number: int, tmp_path: Path) -> None:
    model, tokenizer = built(MODELS[model_type][number]), tiny_tokenizer()
    out = sky_core.hf.export(model, tokenizer, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["model_type"] == model_type
    again, its_tokenizer = sky_core.load(f"hf:{out}")
    state = again.state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tokens_BT = torch.randint(256, (2, 20))
    torch.testing.assert_close(again(tokens_BT), model(tokens_BT), rtol=0, atol=1e-6)
    assert its_tokenizer.encode("to be") == tokenizer.encode("to be")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sandbox"]  # no temporary folder
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_no_two_tensors_share_a_name(model_type: str) -> None:
    model = built(MODELS[model_type][0])
    one, decoder, _ = choose(model)
    groups = plan(model.state_dict(), one.rules(decoder))
    ours, theirs = (
        [name for group in groups for name in part(group)] for part in (lambda g: g.ours, lambda g: g.theirs)
    )
    assert sorted(ours) == sorted(model.state_dict())
    assert len(set(theirs)) == len(theirs)


def test_shards_hold_what_one_file_holds(checkpoint: Any, tmp_path: Path) -> None:
    folder = checkpoint("mixtral")
    found = read(folder)
    shards = sky_core.hf.export(found.model, found.tokenizer, tmp_path / "shards", shard_bytes=8000)
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 2
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert torch.equal(read(shards).model.state_dict()["norm.weight"], found.model.state_dict()["norm.weight"])


def test_what_is_no_weight_is_left_out(checkpoint: Any) -> None:
    folder = checkpoint("gpt2")
    expected = read(folder).model.state_dict()

    def as_of_old(tensors: dict[str, torch.Tensor]) -> None:
        """The bare model with its buffers, as GPT-2's own files are."""
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"], tensors["h.0.attn.masked_bias"] = torch.ones(1, 1, 4, 4), torch.tensor(-1e4)

    rewrite(folder, as_of_old)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read(folder).model.state_dict().items())


def test_further_layers_of_deepseek_are_its_further_tokens(checkpoint: Any) -> None:
    folder = checkpoint("deepseek_v3")
    further = {"model.layers.3.eh_proj.weight": torch.zeros(2, 2), "model.layers.3.mlp.x.weight": torch.zeros(1)}
    rewrite(folder, lambda tensors: tensors.update(further))
    assert read(folder).model.n_layer == 3
    change(folder, num_hidden_layers=2)
    with pytest.raises(UserError, match=r"model.layers.2.* is none of its tensors"):
        read(folder)


def test_a_tied_head_may_be_in_the_file_as_long_as_it_is_the_embedding(checkpoint: Any) -> None:
    folder = checkpoint()
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    read(folder)
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"ties the head .*lm_head.weight is another matrix"):
        read(folder)


# ------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("llama", {"model_type": "lama"}, "no architecture called 'lama'.*did you mean 'llama'"),
        ("llama", {"model_type": ...}, "model_type is missing"),
        ("llama", {"hidden_size": ...}, "hidden_size is missing"),
        ("llama", {"hidden_size": "16"}, "hidden_size is '16'; a whole number"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; a number"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; true or false"),
        ("llama", {"num_key_value_heads": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ("llama", {"hidden_act": "relu6"}, 'hidden_act is "relu6".*known here are silu'),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*only null is computed"),
        ("llama", {"use_cross_layer_sharing": True}, "use_cross_layer_sharing is true.*is not known here"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5.*turns whole heads"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, 'rope_type is "longrope"'),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor is missing"),
        ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one table for all layers"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder is true"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is true"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "there is no sliding_window for them"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "3 times sliding_attention or full_attention"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("mixtral", {"num_experts_per_tok": 5}, "top_k 5 is more than n_experts 4"),
        ("deepseek_v3", {"scoring_func": "softmax"}, 'only "sigmoid" is computed here'),
        ("deepseek_v3", {"n_group": 3}, "4 experts do not divide over 3 groups"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "only 1e-06 is computed here"),
    ],
)
def test_what_would_compute_something_else_is_refused(
    architecture: str, values: dict[str, Any], message: str, checkpoint: Any
) -> None:
    folder = checkpoint(architecture)
    change(folder, **values)
    with pytest.raises(UserError, match=message) as refused:
        read(folder)
    assert "\n" not in str(refused.value)
    assert str(folder / "config.json") in str(refused.value)


def test_keys_that_change_nothing_are_no_hindrance(checkpoint: Any) -> None:
    folder = checkpoint()
    change(folder, torch_dtype="float16", use_cache=False, top_k=50, pad_token_id=0, rope_scaling=None, pruned_heads={})
    read(folder)


def test_rope_of_older_files_is_read(checkpoint: Any) -> None:
    folder = checkpoint()
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 0}
    change(folder, rope_parameters=..., rope_theta=500, rope_scaling=old)
    position = read(folder).model.config.position[0]
    assert (position.theta, position.scaling.kind, position.scaling.beta_fast) == (500.0, "yarn", 32.0)
    shutil.rmtree(folder)
    folder = checkpoint("gpt_neox")
    change(folder, rope_parameters=..., rotary_emb_base=99, rotary_pct=0.5)
    position = read(folder).model.config.position[0]
    assert (position.theta, position.fraction) == (99.0, 0.5)


def test_deepseek_without_its_attention_is_one_clear_line(checkpoint: Any) -> None:
    folder = checkpoint("deepseek_v3")
    load_plugins([])
    with pytest.raises(UserError, match=r"attention: no attention called 'mla' \(have: full\)"):
        read(folder)


# ---------------------------------------------------------------------------------------------------------- files


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def disguised(folder: Path) -> None:
    torch.save({"a": torch.ones(3)}, folder / "model.safetensors")


def index(folder: Path, **weight_map: str | int) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def small_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200]


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[SkyError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), UserError, "no config.json"),
    "config cut off": (lambda f: (f / "config.json").write_text('{"a":'), UserError, "config.json: damaged"),
    "config without end": (lambda f: (f / "config.json").write_text("[" * 100_000), UserError, "config.json: damaged"),
    "layers without end": (lambda f: change(f, num_hidden_layers=10**9), UserError, "a depth of 1,000,000,000 layers"),
    "heads without end": (lambda f: change(f, head_dim=10**9), UserError, "a total width of heads of 4,000,000,000"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), UserError, "no model.safetensors"),
    "a pickle": (as_pickle, UserError, "pytorch_model.bin: a pickle, which can run any code.*save_pretrained"),
    "a pickle in disguise": (
        disguised,
        UserError,
        "model.safetensors: a pickle, which can run any code.*save_pretrained",
    ),
    "cut off": (cut, CheckpointError, "model.safetensors: damaged or cut off"),
    "a shard is missing": (lambda f: index(f, a="x.safetensors"), UserError, "names x.safetensors, which is not there"),
    "a shard elsewhere": (lambda f: index(f, a="../x.safetensors"), UserError, "names ../x.safetensors"),
    "index damaged": (
        lambda f: (index(f), (f / "model.safetensors.index.json").write_text("[]")),
        CheckpointError,
        "index.json: damaged",
    ),
    "index of numbers": (lambda f: index(f, a=3), CheckpointError, "index.json: damaged"),
    "index of another": (lambda f: index(f, a="model-00001-of-00002.safetensors"), CheckpointError, "does not agree"),
    "missing": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), UserError, "model.norm.weight is missing"),
    "surplus": (lambda f: rewrite(f, lambda t: t.update(x=torch.ones(1))), UserError, "x is none of its tensors"),
    "misshapen": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(17)})),
        UserError,
        r"model.norm.weight has shape \(17,\) instead of \(16,\)",
    ),
    "not a number": (
        lambda f: rewrite(f, lambda t: t["model.norm.weight"].__setitem__(3, math.nan)),
        CheckpointError,
        "model.norm.weight holds NaN or infinity; damaged",
    ),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)})),
        UserError,
        "model.norm.weight is kept as I8",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), SkyError, "no tokenizer.json"),
    "tokenizer without end": (lambda f: (f / "tokenizer.json").write_text("[" * 100_000), SkyError, "it is damaged"),
    "a template that runs code": (
        lambda f: (f / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('touch hacked') }}"),
        UserError,
        r"chat_template\.jinja: the chat template tries what is forbidden to it: .*'__globals__'",
    ),
    "another tokenizer": (
        lambda f: (rewrite(f, small_embedding), change(f, vocab_size=200)),
        UserError,
        "its tokenizer has 257 ids and its embedding 200 rows",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told_in_one_line_and_nothing_is_written(what: str, checkpoint: Any) -> None:
    from sky_core.training.imported import import_huggingface

    damage, kind, message = DAMAGE[what]
    folder = checkpoint()
    damage(folder)
    with pytest.raises(kind, match=message) as told:
        import_huggingface(f"hf:{folder}")
    assert "\n" not in str(told.value)
    assert list(Path().iterdir()) == []


def test_a_folder_that_is_not_there_is_no_download() -> None:
    with pytest.raises(UserError, match=r"no such folder.*none is downloaded"):
        sky_core.load("hf:gpt2")


# ---------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedforward": "relu2"}, r"nearest, llama, differs in .*feedforward.0.kind \('relu2' here, 'swiglu' there\)"),
        ({"position": "alibi"}, "model.position.0.kind .'alibi' here"),
        ({"mup": {"base_d_model": 8}}, "model.mup.base_d_model"),
        ({"attention": {"kind": "full", "value_embedding": True}}, "value_embedding"),
        ({"block": {"kind": "pre", "residual_scalars": True}}, "model.block.residual_scalars"),
        ({"feedforward": {**MOE, "bias_update": 0.001}}, "correction_bias"),
        ({"qk_norm": "head", "norm": "layernorm"}, "model.norm.kind"),
    ],
)
def test_a_model_that_no_architecture_holds_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as refused:
        sky_core.hf.export(built({**SIZE, **options}), tiny_tokenizer(), tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.glob("*out*")) == []


def test_an_architecture_may_be_asked_for(tmp_path: Path) -> None:
    model, tokenizer = built(SIZE), ByteTokenizer()
    out = sky_core.hf.export(model, tokenizer, tmp_path / "out", architecture="mistral")
    assert json.loads((out / "config.json").read_text())["sliding_window"] is None
    with pytest.raises(UserError, match=r"qwen3 cannot hold this model: model.qk_norm .None here, 'head' there"):
        sky_core.hf.export(model, tokenizer, tmp_path / "no", architecture="qwen3")
    with pytest.raises(UserError, match="no architecture called 'bert'"):
        sky_core.hf.export(model, tokenizer, tmp_path / "no", architecture="bert")


def test_nothing_is_overwritten_and_nothing_is_left_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = built(SIZE), tiny_tokenizer()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="there is something in it already"):
        sky_core.hf.export(model, tokenizer, tmp_path / "mine")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sky_core.hf.tensors.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        sky_core.hf.export(model, tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name != "sandbox"] == ["mine"]


def test_modules_of_multi_token_prediction_are_left_out_when_asked_and_not_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = Decoder(**GROUPED, n_mtp=1).build(tiny_tokenizer().vocab_size).eval(), tiny_tokenizer()
    with pytest.raises(
        UserError, match=r"1 modules of multi-token prediction, for which llama has no place; .*--without"
    ):
        sky_core.hf.export(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    sky_core.hf.export(model, tokenizer, tmp_path / "out", without_mtp=True)
    tokens_BT = torch.arange(20).view(2, 10)
    assert torch.equal(sky_core.load(f"hf:{tmp_path / 'out'}")[0](tokens_BT), model(tokens_BT))
