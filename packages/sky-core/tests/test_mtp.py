"""Multi-token prediction: what its modules see, what they are trained on, and that they decode as they train."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sky_core.config import parse_run
from sky_core.data.dataset import IGNORE, Batch
from sky_core.errors import ConfigError, UserError
from sky_core.model.decoder import DecoderLM
from sky_core.testing.workbench import TINY, assert_close, shaken, tiny_model, tiny_run, tiny_tokenizer
from sky_core.training.objective import MultiToken, NextToken

VOCAB = 23


def model(n_mtp: int = 2, **options: object) -> DecoderLM:
    return shaken(tiny_model(VOCAB, n_mtp=n_mtp, **options))


def tokens(batch: int = 2, time: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def batch_of(tokens_BT: torch.Tensor, **options: torch.Tensor) -> Batch:
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], **options)


def chain(lm: DecoderLM, tokens_BT: torch.Tensor, depths: int) -> torch.Tensor:
    """Logits of the last of `depths` modules, by the definition: module k reads the tokens k + 1 further on."""
    time = tokens_BT.shape[1] - depths
    hidden_BTD = lm.hidden(tokens_BT[:, :time])
    for depth in range(depths):
        hidden_BTD = lm.mtp_hidden(depth, hidden_BTD, tokens_BT[:, depth + 1 : depth + 1 + time])
    return lm.logits(hidden_BTD)


def test_the_loss_is_that_of_the_next_token_plus_the_mean_of_the_further_ones() -> None:
    lm, tokens_BT = model(), tokens()
    loss = MultiToken(0.3)(lm, batch_of(tokens_BT))
    expected = {
        "nll": F.cross_entropy(lm(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="sum")
    }
    for depth in (1, 2):
        logits_BTV = chain(lm, tokens_BT[:, :-1], depth)
        targets_BT = tokens_BT[:, depth + 1 :]
        nll = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
        expected[f"nll_{depth + 1}"] = 0.3 / 2 * nll
    assert loss.parts.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(loss.parts[name], value)
    assert_close(loss.total, sum(expected.values()))


@pytest.mark.parametrize("depths", [1, 2])
def test_a_module_sees_its_token_and_those_before_but_none_after(depths: int) -> None:
    lm, tokens_BT = model(), tokens(1)
    for changed in range(tokens_BT.shape[1]):
        other_BT = tokens_BT.clone()
        other_BT[0, changed] = (other_BT[0, changed] + 1) % VOCAB
        difference_T = (chain(lm, tokens_BT, depths) - chain(lm, other_BT, depths)).abs().amax(-1)[0]
        seen = [changed <= t + depths for t in range(len(difference_T))]
        assert (difference_T > 0).tolist() == seen


def test_the_next_token_is_predicted_as_without_the_modules() -> None:
    with_modules, without = model(2), model(0)
    missing = without.load_state_dict(with_modules.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(name.startswith("mtp.") for name in missing.unexpected_keys)
    assert torch.equal(with_modules(tokens()), without(tokens()))


def test_targets_of_another_document_are_left_out() -> None:
    lm, tokens_BT = model(), tokens(1, 9)
    documents_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    targets_BT = tokens_BT[:, 1:].clone()
    targets_BT[0, 2] = IGNORE  # the first document's last token
    packed = MultiToken(0.3)(lm, Batch(tokens_BT[:, :-1], targets_BT, documents_BT))
    parts: dict[str, torch.Tensor] = {}
    for part in (tokens_BT[:, :3], tokens_BT[:, 3:]):
        for name, value in MultiToken(0.3)(lm, batch_of(part)).parts.items():
            parts[name] = parts.get(name, torch.tensor(0.0)) + value
    # rope sees distances alone, so positions that go on across documents change nothing
    for name, value in parts.items():
        assert_close(packed.parts[name], value)


@pytest.mark.parametrize("depth", [0, 1])
def test_decoding_in_steps_equals_the_parallel_pass(depth: int) -> None:
    lm, tokens_BT = model(), tokens()
    hidden_BTD = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    expected_BTD = lm.mtp_hidden(depth, hidden_BTD, tokens_BT)
    cache = lm.new_mtp_cache(depth, 2)
    steps = [lm.mtp_hidden(depth, hidden_BTD[:, t : t + 1], tokens_BT[:, t : t + 1], cache=cache) for t in range(9)]
    assert cache.lengths == [9, 9]
    assert_close(torch.cat(steps, dim=1), expected_BTD)


def test_recomputing_activations_changes_no_gradient() -> None:
    gradients = []
    for recompute in ("none", "selective", "block"):
        lm = model().train()
        lm.activation_checkpointing = recompute
        MultiToken(0.3)(lm, batch_of(tokens())).total.backward()
        gradients.append({name: parameter.grad for name, parameter in lm.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert all(torch.equal(gradient, other[name]) for other in gradients[1:])


def test_without_modules_the_objective_says_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"set model\.n_mtp"):
        MultiToken(0.3)(model(0), batch_of(tokens()))


def test_a_run_without_modules_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match=r"objective: multi_token .* set model\.n_mtp to 1 or more"):
        parse_run({"data": {"kind": "none"}, "objective": "multi_token", "train": {"steps": 1, "batch_tokens": 64}})


def test_other_objectives_say_that_they_leave_the_modules_untrained(caplog: pytest.LogCaptureFixture) -> None:
    run = tiny_run(model={**TINY, "n_mtp": 1})
    run.objective.build(run, tiny_tokenizer())
    assert "leaves the model's n_mtp modules untrained; multi_token trains them" in caplog.text


def test_other_objectives_leave_the_modules_alone() -> None:
    lm = model()
    NextToken()(lm, batch_of(tokens())).total.backward()
    assert all(parameter.grad is None for parameter in lm.mtp.parameters())
