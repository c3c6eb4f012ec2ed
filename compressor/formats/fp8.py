"""`fp8`: dense 8-bit floats (e4m3: no infinity, largest 448), one scale for each group of inputs or each row.

The largest weight of a group is scaled to 448, so that small weights keep three bits of mantissa over a wide range
where int8 has even steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.formats.format import Format, QuantizedWeight, Spec, Tensors, checked_floats

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def round_to_e4m3(values: Tensor) -> Tensor:
    """The nearest e4m3 numbers, as float32; what is beyond the range becomes its end."""
    return values.clamp(-LARGEST, LARGEST).to(E4M3).float()


def checked_e4m3(values: Tensor) -> Tensor:
    """Values that e4m3 holds, as float32 with -0.0 as 0; raises ValueError for others, NaN included."""
    values = checked_floats(values, torch.float32)
    if not bool((round_to_e4m3(values) == values).all()):
        raise ValueError("values are not e4m3 numbers; quantise the weight first")
    return values


@dataclass(frozen=True)
class Fp8(Format):
    """`weight_packed` [O, I] float8_e4m3fn, `weight_scale` [O, G]."""

    name: ClassVar[str] = "fp8"
    scaled: ClassVar[bool] = True
    largest: ClassVar[float] = LARGEST

    def rounded(self, values: Tensor) -> Tensor:
        return round_to_e4m3(values)

    def spec(self, out_features: int, in_features: int) -> Spec:
        self.check(out_features, in_features)
        return {
            "weight_packed": ((out_features, in_features), E4M3),
            "weight_scale": ((out_features, self.groups(in_features)), self.dtype),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        self.check(*weight.values.shape)
        scale = self.checked_scale(weight)
        return {"weight_packed": checked_e4m3(weight.values).to(E4M3), "weight_scale": scale}

    def unpack_quantized(self, tensors: Tensors) -> QuantizedWeight:
        return QuantizedWeight(tensors["weight_packed"].float(), tensors["weight_scale"])

    def shape_of(self, tensors: Tensors) -> tuple[int, int]:
        out_features, in_features = tensors["weight_packed"].shape
        return out_features, in_features
