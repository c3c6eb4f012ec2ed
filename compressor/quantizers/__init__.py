"""Quantisers: `quantize(weight, stats, scheme) -> QuantizedWeight`, one file each. All keep zeros zero."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from compressor.formats import QuantizedWeight
from compressor.quantizers.gptq import gptq
from compressor.quantizers.rtn import IntegerGrid, rtn, snap
from compressor.scheme import Scheme

Quantizer = Callable[[Tensor, Any, Scheme], QuantizedWeight]

__all__ = ["NEED_HESSIAN", "QUANTIZERS", "IntegerGrid", "Quantizer", "gptq", "rtn", "snap"]

QUANTIZERS: dict[str, Quantizer] = {
    "rtn": rtn,
    "gptq": gptq,
    "gptq-act-order": partial(gptq, act_order=True),
}
NEED_HESSIAN = ("gptq", "gptq-act-order")
"""Quantisers whose statistics must hold Hessians."""
