"""Weights in 8 or 4 bits for decoding, where reading the weights is what a token costs."""

from sky_core.quantization.linear import QuantizedLinear
from sky_core.quantization.quantize import FORMATS, quantize_

__all__ = ["FORMATS", "QuantizedLinear", "quantize_"]
