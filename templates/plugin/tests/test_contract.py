"""The component keeps the contract of its slot: one class brings the whole suite."""

from __future__ import annotations

import torch
from __MODULE__.plugin import Gated

from sky_core.testing import FeedForwardContract
from sky_core.testing.workbench import Feed, assert_close, noise


class TestGated(FeedForwardContract):
    component = Gated(d_ff=48)

    def test_it_is_the_equation(self) -> None:
        """Beside the contract, hold your technique to an independent oracle."""
        layer, x_BTD = self.layer().double(), noise(2, 5, 32).double()
        gate, up = layer.gate_proj(x_BTD), layer.up_proj(x_BTD)
        expected = layer.down_proj(gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up)
        assert_close(Feed(layer, 2, cached=False)(x_BTD), expected, 1e-12)
