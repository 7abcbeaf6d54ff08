"""lm-evaluation-harness gets the same numbers from our backend as from its Hugging Face one, on the same weights."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from sky_core.components.evaluation import LmEval
from sky_core.components.layers import RMSNorm, SwiGLU
from sky_core.components.model import Decoder
from sky_core.components.position import Rope
from sky_core.errors import SkyError, UserError
from sky_core.eval.score import loglikelihoods
from sky_core.testing.workbench import generators_untouched
from sky_core.tokenizer.bpe import BpeTokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is the oracle here")
transformers = pytest.importorskip("transformers", reason="the harness' own backend needs transformers")
tokenizers = pytest.importorskip("tokenizers", reason="the harness' own backend needs a fast tokenizer")
pytest.importorskip("accelerate", reason="the harness' own backend needs accelerate")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
SkyLM = pytest.importorskip("sky_core.eval.harness").SkyLM

CORPUS = "the cat sat on the mat and the dog sat on the log; a cat and a dog, a mat and a log. 12 times 3 is 36.\n"
MAX_LENGTH = 40
JSON = "dataset_path: json\ndataset_kwargs: {data_files: {test: items.jsonl}}\ntest_split: test\n"
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "word": "output_type: loglikelihood\ndoc_to_text: '{{context}}'\ndoc_to_target: ' {{choices[answer]}}'\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]\n",
    "answer": "output_type: generate_until\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{choices[answer]}}'\n"
    "generation_kwargs: {until: ['.', ' t'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n",
}
ITEMS = [
    {"context": "the cat sat on", "choices": ["the mat", "a log", "12"], "answer": 0, "text": CORPUS * 4},
    {"context": "a dog and the ", "choices": ["cat", "dog", "mat and a log"], "answer": 1, "text": "a"},
    {"context": CORPUS * 3 + "12 times", "choices": ["3", "36", "the log"], "answer": 2, "text": CORPUS[:30]},
    {"context": "times 3 is", "choices": ["36", "the", "on"], "answer": 0, "text": "the log; the cat, 3"},
]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, Any, Any]:
    """Our model and tokenizer, and the same weights and ids as Hugging Face has them."""
    tokenizer = BpeTokenizer.train([CORPUS], 285)
    theirs_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_huggingface())),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        initializer_range=0.4,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = Decoder(
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        head_dim=8,
        d_model=32,
        max_length=MAX_LENGTH,
        bias=False,
        tie_embeddings=False,
        position=(Rope(theta=500.0),),
        norm=RMSNorm(eps=1e-5),
        feedforward=(SwiGLU(d_ff=64),),
    ).build(tokenizer.vocab_size)
    ours.load_state_dict({name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()})
    return ours.eval(), tokenizer, theirs, theirs_tokenizer


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks over a local JSON-lines file, with nothing to be had from a network."""
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in ITEMS))
    Path("tasks").mkdir()
    for name, text in TASKS.items():
        Path(f"tasks/{name}.yaml").write_text(f"task: sky_{name}\n{JSON}{text}")
    return tmp_path / "tasks"


def run(lm: Any, folder: Path, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = [f"sky_{name}" for name in TASKS]
    found = lm_eval.simple_evaluate(
        lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    assert found is not None
    return found


@pytest.mark.parametrize("few_shot", [0, 2])
def test_every_kind_of_task_gives_the_numbers_of_the_hugging_face_backend(
    models: tuple[Any, ...], tasks: Path, few_shot: int
) -> None:
    ours, tokenizer, theirs, theirs_tokenizer = models
    reference = HFLM(pretrained=theirs, tokenizer=theirs_tokenizer, batch_size=1, max_length=MAX_LENGTH)
    expected = run(reference, tasks, num_fewshot=few_shot)
    for batch_tokens in (1, 4096):
        found = run(SkyLM(model=ours, tokenizer=tokenizer, batch_tokens=batch_tokens), tasks, num_fewshot=few_shot)
        for task, samples in expected["samples"].items():
            for mine, yours in zip(found["samples"][task], samples, strict=True):
                flat = [[answer for answers in sample["resps"] for answer in answers] for sample in (mine, yours)]
                for a, b in zip(*flat, strict=True):
                    # log-probabilities are fp32 sums over at most 200 tokens, in another order: 1e-4 relative
                    assert a == (b if isinstance(b, str) else pytest.approx(b, rel=1e-4))
            numbers = {name: value for name, value in expected["results"][task].items() if not isinstance(value, str)}
            assert {name: found["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert {sample["resps"][0][0][1] for sample in expected["samples"]["sky_choice"]} <= {True, False}


def test_the_harness_scores_as_our_own_tasks_do(models: tuple[Any, ...]) -> None:
    ours, tokenizer, *_ = models
    pairs = [("the cat", " sat on"), ("the cat ", "sat"), ("", "the cat")]
    requests = [lm_eval.api.instance.Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = SkyLM(model=ours, tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
    for (logprob, greedy), score in zip(found, loglikelihoods(ours, tokenizer, pairs), strict=True):
        assert (logprob, greedy) == (pytest.approx(score.logprob, rel=1e-5), score.greedy)


def test_the_component_reports_metrics_errors_and_items(models: tuple[Any, ...], tasks: Path) -> None:
    ours, tokenizer, *_ = models
    component = LmEval(tasks=["sky_choice", "sky_word"], include_path=str(tasks))
    with generators_untouched():
        found = component.build()(ours, tokenizer, None)
    assert {"lm_eval/sky_choice/acc", "lm_eval/sky_choice/acc_stderr", "lm_eval/sky_word/perplexity_stderr"} < set(
        found
    )
    assert found["lm_eval/sky_choice/items"] == len(ITEMS)
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    limited = LmEval(tasks=["sky_choice"], include_path=str(tasks), limit=2).build()(ours, tokenizer, None)
    assert limited["lm_eval/sky_choice/items"] == 2


def test_what_the_harness_cannot_do_is_one_clear_line(models: tuple[Any, ...], tasks: Path) -> None:
    ours, tokenizer, *_ = models
    with pytest.raises(UserError, match="no task 'sky_chioce'; did you mean 'sky_choice'"):
        LmEval(tasks=["sky_chioce"], include_path=str(tasks)).build()(ours, tokenizer, None)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        LmEval(tasks=["sky_choice"], include_path="nowhere").build()(ours, tokenizer, None)
    Path("items.jsonl").unlink()
    with pytest.raises(SkyError, match=r"the data of sky_choice cannot be read: .*items\.jsonl"):
        LmEval(tasks=["sky_choice"], include_path=str(tasks)).build()(ours, tokenizer, None)
    with pytest.raises(UserError, match="model_args run="):
        SkyLM()


def test_a_run_is_measured_from_either_command_line(lab: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    Path("items.jsonl").write_text((tasks.parent / "items.jsonl").read_text())
    result = lab.train()
    told = lab.sky("eval", result.directory, "--lm-eval", "sky_choice", "--include-path", tasks, "--json")
    ours = json.loads(told.out)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options = {"run": str(result.directory), "precision": "fp32"}
    theirs = lm_eval.simple_evaluate("sky", model_args=options, tasks=["sky_choice"], task_manager=manager)
    assert ours["lm_eval/sky_choice/acc"] == theirs["results"]["sky_choice"]["acc,none"]
    command = [sys.executable, "-m", "sky_core.eval.harness", "run", "--model", "sky", "--tasks", "sky_choice"]
    command += ["--model_args", f"run={result.directory},precision=fp32", "--include_path", str(tasks)]
    done = subprocess.run([*command, "--output_path", "harness"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = Path("harness").rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["sky_choice"]["acc,none"] == ours["lm_eval/sky_choice/acc"]


def test_the_harness_finds_the_backend_by_its_entry_point() -> None:
    found = [point for point in entry_points(group="lm_eval.models") if point.name == "sky"]
    if not found:
        pytest.skip("sky-core was installed before it had this entry point; install it again")
    assert found[0].load() is SkyLM


def test_without_the_harness_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from sky_core.components.evaluation import LmEval\n"
        "from sky_core.errors import UserError\n"
        "try: LmEval(tasks=['a']).build()\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'sky-core[lm-eval]'" in done.stdout
