"""In which dtype a model computes, which need not be the one that its weights are kept in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

PRECISIONS = ("auto", "fp32", "bf16")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 where the processor multiplies it in hardware, else fp32."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def widened(net: nn.Module) -> Iterator[torch.dtype | None]:
    """Inside, 16-bit parameters on a CPU that has no instructions for them are fp32: products then run several
    times as fast. Afterwards they are as they were, to the bit. Memory: 4 bytes a parameter.

    Yields fp32 if that is so, else None.
    """
    slow = [
        parameter
        for parameter in net.parameters()
        if parameter.device.type == "cpu"
        and parameter.dtype in (torch.bfloat16, torch.float16)
        and compute_dtype("auto", parameter.device) == torch.float32
    ]
    kept = [parameter.data for parameter in slow]
    for parameter, data in zip(slow, kept, strict=True):
        parameter.data = data.float()
    try:
        yield torch.float32 if slow else None
    finally:
        for parameter, data in zip(slow, kept, strict=True):
            parameter.data = data
