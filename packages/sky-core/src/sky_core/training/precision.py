"""What the forward pass computes in: fp32, or bf16 under autocast. Parameters and optimizer state are fp32 always."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

from sky_core.errors import ConfigError

log = logging.getLogger(__name__)


@lru_cache
def bf16_hardware(device_type: str, index: int | None = None) -> str | None:
    """What multiplies bf16 in hardware on this device (an instruction set, a GPU), or None."""
    if device_type == "cpu":
        if torch.cpu._is_amx_tile_supported():
            return "AMX"
        return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else None
    if device_type == "cuda":
        name = torch.cuda.get_device_name(index)
        return name if torch.version.hip or torch.cuda.get_device_capability(index) >= (8, 0) else None
    return None


def resolve_precision(requested: str, device: torch.device | str) -> str:
    """ "fp32" or "bf16" for a device; logs which and why.

    "auto" takes bf16 where the hardware multiplies it and fp32 elsewhere. Raises `ConfigError` for any other word.
    """
    if requested not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"train.precision: {requested!r} is none of auto, fp32, bf16")
    device = torch.device(device)
    hardware = bf16_hardware(device.type, device.index)
    if requested == "auto":
        chosen = "bf16" if hardware else "fp32"
        reason = f"{hardware} multiplies bf16" if hardware else f"no bf16 arithmetic on this {device.type}"
    else:
        chosen = requested
        emulated = requested == "bf16" and not hardware
        reason = f"as asked; this {device.type} only emulates bf16, expect it to be slow" if emulated else "as asked"
    log.info("precision %s (%s)", chosen, reason)
    return chosen
