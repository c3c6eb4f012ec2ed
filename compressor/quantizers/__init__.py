"""Quantisers: `quantize(weight, stats, scheme) -> QuantizedWeight`, one file each. All keep zeros zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from compressor.formats import QuantizedWeight
from compressor.quantizers.rtn import rtn, snap
from compressor.scheme import Scheme

Quantizer = Callable[[Tensor, Any, Scheme], QuantizedWeight]

__all__ = ["QUANTIZERS", "Quantizer", "rtn", "snap"]

QUANTIZERS: dict[str, Quantizer] = {"rtn": rtn}
