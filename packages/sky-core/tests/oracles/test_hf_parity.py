"""Every architecture computes what transformers computes with the same files, and its files come back as they were.

Always through saved files: in memory transformers fuses experts, and names and shapes of a file are what counts.
Weights are ten times as large as usual, gains and biases random, the router's bias not zero: a fresh model hides
errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sky_core.hf
from sky_core.components.generation import Greedy
from sky_core.generation.text import generate
from sky_core.hf.read import Read, read
from sky_core.hf.tensors import TensorFiles
from sky_core.plugins import load_plugins
from sky_core.tokenizer.bpe import BpeTokenizer
from sky_core.tokenizer.huggingface import write_huggingface

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
pytest.importorskip("tokenizers", reason="Hugging Face tokenizers need it")

MLA = Path(__file__).parents[1] / "mla_plugin.py"
VOCAB, LENGTH = 300, 24
ATOL = 1e-5  # logits are about 5: fp32 sums of some ten terms in another order, a few layers deep, give 2e-6

LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**LLAMA, "num_key_value_heads": 2}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
QWEN3_MOE = {**GROUPED, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}


def rope(kind: str, **options: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **options}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    ),
    "llama": ("Llama", GROUPED),
    "llama-tied-biased": (
        "Llama",
        {**GROUPED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama-multi-query": ("Llama", {**LLAMA, "num_key_value_heads": 1, "attention_bias": True}),
    "llama-llama3": (
        "Llama",
        {
            **GROUPED,
            **rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
            ),
        },
    ),
    "llama-yarn": ("Llama", {**GROUPED, **YARN}),
    "llama-linear": ("Llama", {**GROUPED, **rope("linear", factor=4.0)}),
    "llama-dynamic": ("Llama", {**GROUPED, "max_position_embeddings": 16, **rope("dynamic", factor=4.0)}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 8, "head_dim": 8}),
    "mistral-full": ("Mistral", {**GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2-windowed": (
        "Qwen2",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 16}),
    "olmo2": ("Olmo2", {**GROUPED, "attention_bias": True}),
    "gemma2": (
        "Gemma2",
        {
            **GROUPED,
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gpt-neox": ("GPTNeoX", LLAMA),
    "gpt-neox-serial": (
        "GPTNeoX",
        {
            **LLAMA,
            "use_parallel_residual": False,
            "attention_bias": False,
            **rope("default", partial_rotary_factor=0.5),
        },
    ),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4, "sliding_window": 8}),
    "qwen3-moe": ("Qwen3Moe", {**QWEN3_MOE, "head_dim": 16, "mlp_only_layers": [1]}),
    "qwen3-moe-sparse-step": ("Qwen3Moe", {**QWEN3_MOE, "norm_topk_prob": False, "decoder_sparse_step": 2}),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK),
    "deepseek-v3-yarn": (
        "DeepseekV3",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            **rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3),
        },
    ),
}
EACH = pytest.mark.parametrize("case", CASES)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _plugins(sky_sandbox: Path) -> None:
    load_plugins([str(MLA)])


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return BpeTokenizer.train([Path(__file__).read_text()], VOCAB, pattern="gpt4", end_of_text=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: BpeTokenizer) -> Callable[[str], tuple[Any, Path]]:
    """A case -> transformers' model, and the folder that it was saved to."""
    made: dict[str, tuple[Any, Path]] = {}

    def save(case: str) -> tuple[Any, Path]:
        if case not in made:
            family, options = CASES[case]
            model = random_model(family, options)
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            write_huggingface(tokenizer, folder)
            made[case] = model, folder
        return made[case]

    return save


def random_model(family: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.uniform_(-0.5, 0.5)
    return model.eval()


def random_tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def largest(difference_BTV: torch.Tensor) -> float:
    return float(difference_BTV.abs().max())


@EACH
@torch.no_grad()
def test_logits_are_those_of_transformers(case: str, saved: Any) -> None:
    theirs, folder = saved(case)
    found = read(folder)
    assert found.architecture.model_type == theirs.config.model_type
    assert found.dtype == "float32"
    tokens_BT = random_tokens()
    expected_BTV = theirs(tokens_BT).logits
    assert expected_BTV.abs().max() > 2, "too small to tell errors"
    difference = largest(found.model(tokens_BT) - expected_BTV)
    assert difference <= ATOL


@EACH
@torch.no_grad()
def test_decoding_token_by_token_gives_the_logits_of_transformers(case: str, saved: Any) -> None:
    theirs, folder = saved(case)
    model = read(folder).model
    # Past its original length the base of dynamic NTK is another one at every step; and a model of transformers forgets
    # a longer pass than that only in one that is shorter.
    tokens_BT = random_tokens()[:, : 15 if case == "llama-dynamic" else LENGTH]
    expected_BTV = theirs(tokens_BT).logits
    cache = model.new_cache(2)
    steps = [model(tokens_BT[:, :5], cache=cache)]
    steps += [model(tokens_BT[:, t : t + 1], cache=cache) for t in range(5, tokens_BT.shape[1])]
    difference = largest(torch.cat(steps, dim=1) - expected_BTV)
    assert difference <= ATOL


@pytest.mark.parametrize("case", ["gpt2", "llama", "llama-tied-biased", "qwen3-moe"])
def test_gradients_are_those_of_transformers(case: str, saved: Any, tmp_path: Path) -> None:
    """Their gradients go through a file as well: saved in place of the weights, and read by the same rules."""
    _, folder = saved(case)
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), read(folder).model
    tokens_BT = random_tokens()
    targets_BT = tokens_BT.roll(-1, 1)
    torch.nn.functional.cross_entropy(
        theirs(tokens_BT).logits.flatten(0, 1), targets_BT.flatten(), reduction="sum"
    ).backward()
    ours.nll(ours.hidden(tokens_BT), targets_BT).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path)
    write_huggingface(read(folder).tokenizer, tmp_path)
    expected = {name: weight.detach() for name, weight in read(tmp_path).model.named_parameters()}
    largest_of_all = max(largest(weight) for weight in expected.values())
    worst = 0.0
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        # A bias of keys shifts all scores of a query alike: without RoPE its gradient is 0, and what is left is noise.
        scale = largest_of_all if case == "gpt2" and name.endswith("k_proj.bias") else largest(expected[name])
        worst = max(worst, largest(parameter.grad - expected[name]) / scale)
    assert worst <= 1e-4


NOT_COMPARED = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
EQUIVALENT = {  # what a missing value stands for
    "n_inner": lambda config: 4 * config.n_embd,
    "head_dim": lambda config: config.hidden_size // config.num_attention_heads,
}
UNREAD = {"max_window_layers", "mlp_only_layers", "decoder_sparse_step", "num_nextn_predict_layers", "num_mtp_layers"}
UNREAD |= {"attn_pdrop", "embd_pdrop", "resid_pdrop", "bos_token_id", "eos_token_id", "pad_token_id"}


def same_files(first: Path, second: Path) -> None:
    """Names, shapes, dtypes and values."""
    a, b = TensorFiles(first), TensorFiles(second)
    assert (a.shapes, a.dtypes) == (b.shapes, b.dtypes)
    for name in a.shapes:
        assert torch.equal(a.read(name), b.read(name)), name


@EACH
@torch.no_grad()
def test_a_checkpoint_comes_back_tensor_for_tensor(case: str, saved: Any, tmp_path: Path) -> None:
    theirs, folder = saved(case)
    found = read(folder)
    out = sky_core.hf.export(found.model, found.tokenizer, tmp_path / "out", architecture=found.architecture.model_type)
    same_files(folder, out)
    again = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens_BT = random_tokens()
    assert torch.equal(again(tokens_BT).logits, theirs(tokens_BT).logits)
    before, after = theirs.config.to_dict(), again.config.to_dict()
    for key, value in before.items():
        if key not in NOT_COMPARED | UNREAD and value is None and key in EQUIVALENT:
            value = EQUIVALENT[key](theirs.config)
        if key == "rope_parameters":
            assert {**after[key], **value} == after[key]
        elif key not in NOT_COMPARED | UNREAD:
            assert after[key] == value, key
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (out / name).read_bytes()


def test_a_bf16_checkpoint_in_shards_comes_back_tensor_for_tensor(tmp_path: Path, tokenizer: BpeTokenizer) -> None:
    theirs = random_model(*CASES["deepseek-v3"]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    write_huggingface(tokenizer, tmp_path / "in")
    found = read(tmp_path / "in")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists()
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}
    out = sky_core.hf.export(found.model, found.tokenizer, tmp_path / "out", dtype="bfloat16", shard_bytes=100_000)
    given, kept = TensorFiles(tmp_path / "in"), TensorFiles(out)
    assert given.shapes == kept.shapes
    assert len(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == len(kept.shapes)
    for name in given.shapes:
        # The router's bias is fp32 for transformers even in a bf16 model; `.to` above rounded it.
        assert torch.equal(given.read(name).float(), kept.read(name).float()), name
        assert kept.dtypes[name] == (torch.float32 if "e_score" in name else torch.bfloat16)
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype == torch.bfloat16


FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gpt-neox", "mixtral", "qwen3-moe"]


@pytest.mark.parametrize("case", [*FAMILIES, "deepseek-v3"])
def test_transformers_generates_our_greedy_text_from_our_export(case: str, saved: Any, tmp_path: Path) -> None:
    found: Read = read(saved(case)[1])
    out = sky_core.hf.export(found.model, found.tokenizer, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = "the cat sat on"
    inputs = their_tokenizer(prompt, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [found.tokenizer.encode(prompt)]
    ids = theirs.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = their_tokenizer.decode(ids, skip_special_tokens=True)
    assert text == generate(found.model, found.tokenizer, prompt, max_new_tokens=20, sampler=Greedy())
    assert len(text) > 5
