"""The parts of sky-demo keep the contracts of their slots."""

from __future__ import annotations

import pytest
import torch

from sky_core.errors import UserError
from sky_core.testing import AttentionContract, ObjectiveContract
from sky_core.testing.workbench import Feed, assert_close, noise
from sky_demo.linear_attention import LinearAttention, feature_map
from sky_demo.plugin import Linear, ZLoss


class TestLinear(AttentionContract):
    component = Linear(chunk=4)
    softmax = False

    def test_parallel_and_recurrent_form_are_the_equations(self) -> None:
        """Equations 18 to 20 of the paper, head by head and token by token, in float64."""
        layer, x_BTD = self.layer(position="none").double(), noise(1, 9, 32).double()
        assert isinstance(layer, LinearAttention)
        q, k, v = (p(x_BTD)[0].view(9, -1, 8) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        heads = []
        for head in range(4):
            group = head // 2
            s_EF, z_E, outputs = torch.zeros(8, 8).double(), torch.zeros(8).double(), []
            for t in range(9):
                key = feature_map(k[t, group])
                s_EF, z_E = s_EF + torch.outer(key, v[t, group]), z_E + key
                query = feature_map(q[t, head])
                outputs.append(query @ s_EF / (query @ z_E))
            heads.append(torch.stack(outputs))
        expected = layer.o_proj(torch.cat(heads, dim=-1))
        assert_close(Feed(layer, 1, cached=False)(x_BTD)[0], expected, 1e-12)

    @pytest.mark.parametrize("chunk", [1, 3, 64])
    def test_the_size_of_chunks_does_not_matter(self, chunk: int) -> None:
        layer, x_BTD = self.layer(), noise(2, 11, 32)
        expected = Feed(layer, 2, cached=False)(x_BTD)
        layer.chunk = chunk
        self.close(Feed(layer, 2, cached=False)(x_BTD), expected)

    def test_the_cache_does_not_grow(self) -> None:
        sizes = [self.layer().new_cache(1, length, torch.device("cpu"), torch.float32) for length in (8, 8000)]
        assert sizes[0].tensors()["s"].shape == sizes[1].tensors()["s"].shape

    def test_a_prefix_language_model_cannot_be_decoded(self) -> None:
        with pytest.raises(UserError, match="prefix"):
            Feed(self.layer(), 1)(noise(1, 4, 32), prefix_B=torch.tensor([2]))


class TestZLoss(ObjectiveContract):
    component = ZLoss()

    def test_without_a_coefficient_it_is_next_token_prediction(self) -> None:
        batch, model = self.prepared(), self.model
        self.objective.coefficient = 0.0
        expected = model.nll(model.hidden(batch.tokens_BT), batch.targets_BT)
        assert_close(self.loss(batch).total, expected)

    def test_it_sees_a_shift_of_all_logits(self) -> None:
        loss = self.loss(self.prepared())
        assert loss.parts["z_loss"] > 0
        assert_close(loss.total.detach(), loss.parts["nll"] + loss.parts["z_loss"])
