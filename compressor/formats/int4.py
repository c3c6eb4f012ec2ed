"""`int4`: dense 4-bit values, symmetric, one scale for each group of inputs: 4 bits a weight and the scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.formats.format import Format, QuantizedWeight, Spec, Tensors, checked_grid
from compressor.formats.nibbles import pack_nibbles, unpack_nibbles


@dataclass(frozen=True)
class Int4(Format):
    """`weight_packed` [O, I / 2] uint8, two values a byte, `weight_scale` [O, G]."""

    name: ClassVar[str] = "int4"
    grid: ClassVar[tuple[int, int]] = (-8, 7)
    scaled: ClassVar[bool] = True
    largest: ClassVar[float] = 8

    def check(self, out_features: int, in_features: int) -> None:
        super().check(out_features, in_features)
        if in_features % 2:
            raise ValueError(f"in_features {in_features} is odd; int4 stores two values a byte")

    def spec(self, out_features: int, in_features: int) -> Spec:
        self.check(out_features, in_features)
        return {
            "weight_packed": ((out_features, in_features // 2), torch.uint8),
            "weight_scale": ((out_features, self.groups(in_features)), self.dtype),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        self.check(*weight.values.shape)
        scale = self.checked_scale(weight)
        return {"weight_packed": pack_nibbles(checked_grid(weight.values, self.grid)), "weight_scale": scale}

    def unpack_quantized(self, tensors: Tensors) -> QuantizedWeight:
        return QuantizedWeight(unpack_nibbles(tensors["weight_packed"]), tensors["weight_scale"])

    def shape_of(self, tensors: Tensors) -> tuple[int, int]:
        out_features, half = tensors["weight_packed"].shape
        return out_features, 2 * half
