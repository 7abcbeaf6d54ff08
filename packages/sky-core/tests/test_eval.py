"""The validation loss: every target of the split once, in units that compare, with nothing disturbed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from sky_core.components.evaluation import LossEval
from sky_core.data.dataset import IGNORE, Batch, Dataset
from sky_core.data.mixture import Mixture
from sky_core.errors import DataError
from sky_core.eval.loss import validation_loss
from sky_core.eval.statistics import ratio_stderr
from sky_core.model.language_model import LanguageModel
from sky_core.tokenizer.byte import ByteTokenizer

BYTES = ByteTokenizer()
TEXT = "To be, or not to be: that is the question — whether 'tis nobler in the mind"


class Split(Dataset):
    """One stream of ids as a validation split of sequences, the last one short."""

    tokenizer = BYTES
    sequence_length = 16
    fingerprint = "split"

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.batch_sizes: list[int] = []

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, start: int, count: int) -> Batch:
        raise NotImplementedError

    def validation(self, batch_size: int) -> Iterator[Batch]:
        T = self.sequence_length
        rows = [self.ids[start : start + T + 1] for start in range(0, len(self.ids) - 1, T)]
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            self.batch_sizes.append(len(batch))
            tokens_BT = torch.tensor([row[:-1] + [0] * (T + 1 - len(row)) for row in batch])
            targets_BT = torch.tensor([row[1:] + [IGNORE] * (T + 1 - len(row)) for row in batch])
            yield Batch(tokens_BT, targets_BT)


def direct_nll(model: LanguageModel, ids: list[int]) -> float:
    """Σ nll in float64, a row at a time, from nothing but the logits."""
    model.double()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            row = torch.tensor(ids[start : start + 17])
            logprob_TV = model(row[None, :-1])[0].log_softmax(-1)
            total -= logprob_TV[torch.arange(len(row) - 1), row[1:]].sum().item()
    model.float()
    return total


def test_the_loss_is_that_of_the_whole_split_in_float64(tiny_model: LanguageModel) -> None:
    ids = BYTES.encode(TEXT)
    assert (len(ids) - 1) % 16, "the last sequence should be a short one"
    results = validation_loss(tiny_model, BYTES, Split(ids))
    nll = direct_nll(tiny_model, ids)
    assert results["tokens"] == len(ids) - 1
    # fp32 forward against float64: 1e-5 relative
    assert results["loss"] == pytest.approx(nll / (len(ids) - 1), rel=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(nll / (len(ids) - 1)), rel=1e-4)
    assert results["bits_per_byte"] == pytest.approx(nll / math.log(2) / (len(TEXT.encode()) - 1), rel=1e-5)


def test_standard_errors_are_over_sequences(tiny_model: LanguageModel) -> None:
    ids = BYTES.encode(TEXT)
    rows = [ids[start : start + 17] for start in range(0, len(ids) - 1, 16)]
    results = validation_loss(tiny_model, BYTES, Split(ids))
    costs, sizes = [direct_nll(tiny_model, row) for row in rows], [len(row) - 1 for row in rows]
    loss, stderr = ratio_stderr(costs, sizes)
    assert stderr is not None
    assert results["sequences"] == len(rows)
    assert results["loss_stderr"] == pytest.approx(stderr, rel=1e-3)
    assert results["perplexity_stderr"] == pytest.approx(math.exp(loss) * stderr, rel=1e-3)
    assert results["bits_per_byte_stderr"] == pytest.approx(stderr / math.log(2), rel=1e-3)
    assert "loss_stderr" not in validation_loss(tiny_model, BYTES, Split(ids[:10])), "one sequence has none"


def test_a_mixture_is_measured_by_domain_and_as_a_whole(tiny_model: LanguageModel) -> None:
    english, code = BYTES.encode(TEXT), BYTES.encode("def f(x):\n    return [y for y in x if y is not None]\n" * 2)
    mixture = Mixture([(0.9, Split(english)), (0.1, Split(code))], ["english", "code"])
    seen: list[int] = []
    results = validation_loss(tiny_model, BYTES, mixture, batch_tokens=32, progress=seen.append)
    alone = {
        name: validation_loss(tiny_model, BYTES, Split(ids)) for name, ids in (("english", english), ("code", code))
    }
    for name, expected in alone.items():
        for metric in ("bits_per_byte", "bits_per_byte_stderr", "bytes", "sequences"):
            assert results[f"loss/{name}/{metric}"] == pytest.approx(expected[metric])
    tokens = sum(part["tokens"] for part in alone.values())
    assert results["tokens"] == tokens == seen[-1]
    assert results["loss"] == pytest.approx(sum(part["loss"] * part["tokens"] for part in alone.values()) / tokens)
    with pytest.raises(DataError, match="domain 'code' holds no text"):
        validation_loss(tiny_model, BYTES, Mixture([(1, Split(english)), (1, Split([5]))], ["english", "code"]))


def test_predicting_the_end_of_text_costs_bits_but_adds_no_bytes(tiny_model: LanguageModel) -> None:
    ids = [*BYTES.encode("one"), BYTES.end_of_text, *BYTES.encode("two")]
    results = validation_loss(tiny_model, BYTES, Split(ids))
    assert (results["tokens"], results["bytes"]) == (6, 5)
    assert results["bits_per_byte"] == pytest.approx(direct_nll(tiny_model, ids) / math.log(2) / 5, rel=1e-5)


def test_bytes_are_those_the_target_tokens_stand_for(tiny_model: LanguageModel) -> None:
    class Pairs(ByteTokenizer):
        def token_bytes(self) -> list[int]:
            return [2 if i < 128 else 1 for i in range(self.vocab_size)]

    ids = [1, 2, 200, 3]
    assert validation_loss(tiny_model, Pairs(), Split(ids))["bytes"] == 5


@pytest.mark.parametrize(("batch_tokens", "sizes"), [(1, [1, 1, 1, 1, 1]), (40, [2, 2, 1]), (10_000, [5])])
def test_the_result_does_not_depend_on_the_batch_size(
    tiny_model: LanguageModel, batch_tokens: int, sizes: list[int]
) -> None:
    split = Split(BYTES.encode(TEXT))
    results = LossEval(batch_tokens=batch_tokens).build()(tiny_model, BYTES, split, torch.no_grad)
    assert split.batch_sizes == sizes
    assert results == pytest.approx(validation_loss(tiny_model, BYTES, Split(BYTES.encode(TEXT))), rel=1e-5)


def test_nothing_is_disturbed(tiny_model: LanguageModel) -> None:
    class Noisy(type(tiny_model)):  # type: ignore[misc]
        """Draws random numbers and looks at its mode, as a stochastic layer would."""

        def hidden(self, *args: torch.Tensor, **options: object) -> torch.Tensor:
            assert not self.training
            torch.rand(3)
            return super().hidden(*args, **options)

    tiny_model.__class__ = Noisy
    tiny_model.train()
    part = list(tiny_model.modules())[-1]
    part.eval()
    modes = [module.training for module in tiny_model.modules()]
    rng = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    validation_loss(tiny_model, BYTES, Split(BYTES.encode(TEXT)))
    assert [module.training for module in tiny_model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny_model.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_the_mode_comes_back_when_the_evaluation_fails(tiny_model: LanguageModel) -> None:
    tiny_model.train()
    with pytest.raises(IndexError):
        validation_loss(tiny_model, BYTES, Split([1, 2, 99_999, 3]))
    assert tiny_model.training


def test_progress_counts_tokens(tiny_model: LanguageModel) -> None:
    seen: list[int] = []
    validation_loss(tiny_model, BYTES, Split(BYTES.encode(TEXT)), batch_tokens=32, progress=seen.append)
    assert seen == [32, 64, len(TEXT.encode()) - 1]


def test_bf16_is_near(tiny_model: LanguageModel) -> None:
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    split = Split(BYTES.encode(TEXT))
    exact = validation_loss(tiny_model, BYTES, split)["loss"]
    # bf16 has 8 bits of mantissa: 2^-8 relative per product, averaged over tokens
    assert validation_loss(tiny_model, BYTES, split, autocast)["loss"] == pytest.approx(exact, rel=1e-2)


def test_a_split_without_text_is_an_error(tiny_model: LanguageModel) -> None:
    for ids in ([5], [5, BYTES.end_of_text]):
        with pytest.raises(DataError, match="validation split holds no text"):
            validation_loss(tiny_model, BYTES, Split(ids))


def test_no_more_logits_are_held_than_the_bound_however_long_the_sequences(
    tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Split(BYTES.encode(TEXT))
    expected = validation_loss(tiny_model, BYTES, split)
    held: list[int] = []
    logits = tiny_model.logits

    def counted(hidden_BTD: torch.Tensor) -> torch.Tensor:
        held.append(hidden_BTD[..., 0].numel() * tiny_model.vocab_size)
        return logits(hidden_BTD)

    monkeypatch.setattr(tiny_model, "logits", counted)
    monkeypatch.setattr("sky_core.eval.loss.CHUNK", 5 * tiny_model.vocab_size)  # fewer than the 16 tokens of a sequence
    found = validation_loss(tiny_model, BYTES, split)
    assert max(held) <= 5 * tiny_model.vocab_size
    assert sum(held) >= split.sequence_length * tiny_model.vocab_size
    assert found == pytest.approx(expected, rel=1e-5)  # matrix products of other sizes round otherwise
