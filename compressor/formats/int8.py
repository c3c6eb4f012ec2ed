"""`int8`: dense int8 values, symmetric, one scale for each group of inputs: 8 bits a weight and the scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.formats.format import Format, QuantizedWeight, Spec, Tensors, checked_grid


@dataclass(frozen=True)
class Int8(Format):
    """`weight_packed` [O, I] int8, `weight_scale` [O, G]."""

    name: ClassVar[str] = "int8"
    grid: ClassVar[tuple[int, int]] = (-127, 127)
    scaled: ClassVar[bool] = True
    largest: ClassVar[float] = 127

    def spec(self, out_features: int, in_features: int) -> Spec:
        self.check(out_features, in_features)
        return {
            "weight_packed": ((out_features, in_features), torch.int8),
            "weight_scale": ((out_features, self.groups(in_features)), self.dtype),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        self.check(*weight.values.shape)
        scale = self.checked_scale(weight)
        return {"weight_packed": checked_grid(weight.values, self.grid), "weight_scale": scale}

    def unpack_quantized(self, tensors: Tensors) -> QuantizedWeight:
        return QuantizedWeight(tensors["weight_packed"], tensors["weight_scale"])

    def shape_of(self, tensors: Tensors) -> tuple[int, int]:
        out_features, in_features = tensors["weight_packed"].shape
        return out_features, in_features
