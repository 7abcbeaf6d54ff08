"""lm-evaluation-harness (Biderman et al. 2024, arXiv:2405.14782) on sky models: any of its tasks, scored its way.

    sky eval RUN --lm-eval lambada_openai,blimp
    python -m sky_core.eval.harness run --model sky --model_args run=runs/x --tasks hellaswag

The second line is the harness's own command line with this backend in it; releases after 0.4.13 find it by the entry
point `lm_eval.models`, and there `lm-eval run ...` does as well. Tokenization of contexts and continuations, windows of
rolling log-likelihoods and few-shot prompts are the harness's own (its `TemplateLM` and `utils`), so that numbers
compare with those of its other backends; forward passes are those of `sky_core.eval.score`, generation is
`sky_core.generation`'s.

Needs the extra `sky-core[lm-eval]`.
"""

from __future__ import annotations

import logging
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sky_core.component import closest
from sky_core.errors import SkyError, UserError
from sky_core.eval.score import Autocast, batches, score_tokens, start_token
from sky_core.generation.decode import generate_tokens
from sky_core.generation.text import make_sampler
from sky_core.training.load import load
from sky_core.training.precision import resolve_precision

try:
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(f"lm_eval needs lm-evaluation-harness ({error}): pip install 'sky-core[lm-eval]'") from error

if TYPE_CHECKING:
    from sky_core.components.evaluation import LmEval
    from sky_core.model.language_model import LanguageModel
    from sky_core.tokenizer.base import Tokenizer

log = logging.getLogger("sky_core.eval")

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Options of generation that a task may set where it samples."""

BOOTSTRAPS = 1000
"""Resamplings for the standard errors that have no formula (the harness's own default takes minutes)."""


@register_model("sky")
class SkyLM(TemplateLM):
    """A sky model as the harness sees it.

    `run` is whatever `sky_core.load` takes; or `model` and `tokenizer` are given with `autocast`, as they are.
    `precision` is auto, fp32 or bf16. `batch_tokens` bounds the tokens of one forward pass; the harness's own
    `batch_size` and `max_batch_size` are taken and not used.
    """

    def __init__(
        self,
        run: str | None = None,
        *,
        model: LanguageModel | None = None,
        tokenizer: Tokenizer | None = None,
        autocast: Autocast = nullcontext,
        device: str | None = None,
        precision: str = "auto",
        batch_tokens: int = 16384,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if run is not None:
            model, tokenizer = load(run)
            where = torch.device(device or "cuda")
            if where.type == "cuda" and not torch.cuda.is_available():  # the harness asks for it unless told otherwise
                where = torch.device("cpu")
                log.info("no CUDA device here: evaluating on the CPU")
            for module in (model, *(attached.module for attached in model.adapters)):
                module.to(where)
            bf16 = resolve_precision(precision, where) == "bf16"
            autocast = lambda: torch.autocast(where.type, dtype=torch.bfloat16, enabled=bf16)  # noqa: E731 - a new context each time
        if model is None or tokenizer is None:
            raise UserError("which model? give model_args run=... (a run directory, a name, @last, hf:DIR)")
        self.sky_model, self.sky_tokenizer, self.autocast = model, tokenizer, autocast
        self.batch_tokens = batch_tokens
        self.max_length = model.max_length
        self._device = next(model.parameters()).device
        self._templated = False

    # ------------------------------------------------------------------------------------------ text and tokens

    @property
    def eot_token_id(self) -> int:
        return start_token(self.sky_tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes the requests that the harness caches."""
        return f"sky-{self.sky_tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Names of special tokens are tokens in a rendered conversation, and text elsewhere."""
        if self._templated:
            return self.sky_tokenizer.encode_with_special(string)
        prefix = () if add_special_tokens is False else self.sky_tokenizer.prompt_prefix
        return [*prefix, *self.sky_tokenizer.encode(string)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.sky_tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self._templated = True
        return self.sky_tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    # ------------------------------------------------------------------------------------------ what tasks ask for

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = score_tokens(self.sky_model, pairs, self.autocast, batch_tokens=self.batch_tokens)
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text whole: in windows side by side, each token with the context that its window holds."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            cut = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += cut
            owners += [owner] * len(cut)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy unless the task says `do_sample: true`; contexts are cut on the left to leave room for the answer."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(request.args[1])].append(i)
        answers = [""] * len(requests)
        for group in groups.values():
            options = dict(normalize_gen_kwargs(requests[group[0]].args[1]))
            count, stop = options["max_gen_toks"], [text for text in options["until"] if text]
            sampling = {name: options.get(name) for name in SAMPLING} if options["do_sample"] else {"temperature": 0.0}
            room = self.max_length - count
            keep = room if room > 0 else max(1, self.max_length // 2)  # generation goes on past the context
            prompts = [(self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[-keep:] for i in group]
            for batch in batches([min(self.max_length, len(prompt) + count) for prompt in prompts], self.batch_tokens):
                with self.autocast():
                    found = generate_tokens(
                        self.sky_model,
                        self.sky_tokenizer,
                        [prompts[j] for j in batch],
                        max_new_tokens=count,
                        sampler=make_sampler(**sampling),
                        stop=stop,
                    )
                for j, generation in zip(batch, found, strict=True):
                    answers[group[j]] = generation.text
        return answers


def lm_eval_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    _dataset: Any = None,
    autocast: Autocast = nullcontext,
    *,
    options: LmEval,
) -> dict[str, float]:
    """The metrics of the tasks with their standard errors, and `items`, each as `<options.name>/<task>/<metric>`.

    Raises `UserError` for a task that does not exist and `SkyError` where its data cannot be read.
    """
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UserError(f"{options.include_path}: no such folder; include_path holds the YAML files of tasks")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(max(logging.WARNING, logging.getLogger().level))
    try:
        manager = _tasks_for(options)
        with _generators_kept():
            found = simple_evaluate(
                SkyLM(model=model, tokenizer=tokenizer, autocast=autocast, batch_tokens=options.batch_tokens),
                tasks=options.tasks,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                task_manager=manager,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
    except (DatasetsError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SkyError(f"the data of {', '.join(options.tasks)} cannot be read: {reason}") from error
    finally:
        logger.setLevel(level)
    return {f"{options.name}/{name}": value for name, value in _numbers(found).items()}


@cache
def _harness_tasks() -> TaskManager:
    return TaskManager()


def _tasks_for(options: LmEval) -> TaskManager:
    """An index that has the tasks. Indexing the harness's own, thousands of files, takes seconds: only where needed."""

    def missing(manager: TaskManager) -> list[str]:
        return [task for task in options.tasks if task not in manager.all_tasks and not Path(task).is_file()]

    own = TaskManager(include_path=options.include_path, include_defaults=False)
    if not missing(own):
        return own
    manager = TaskManager(include_path=options.include_path) if options.include_path else _harness_tasks()
    if unknown := missing(manager):
        near = closest(unknown[0], [*own.all_tasks, *manager.all_tasks])
        raise UserError(f"lm-evaluation-harness knows no task {unknown[0]!r}{near}")
    return manager


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """The harness names a metric "acc,none" (metric, filter) and its standard error "acc_stderr,none"."""
    results: dict[str, float] = {}
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            metric, comma, of_filter = name.partition(",")
            if comma and isinstance(value, int | float) and math.isfinite(value):
                base, is_stderr, _ = metric.partition("_stderr")
                label = base if of_filter == "none" else f"{base}.{of_filter}"
                results[f"{task}/{label}{is_stderr}"] = float(value)
        if task in found.get("n-samples", {}):
            results[f"{task}/items"] = float(found["n-samples"][task]["effective"])
    return results


@contextmanager
def _generators_kept() -> Iterator[None]:
    """The harness seeds every global random generator; afterwards they are what they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
