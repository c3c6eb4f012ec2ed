"""`sparse24_int8`: 2:4 sparse int8 values: 4 bits a weight, 1 bit for positions, and the scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.formats.format import Format, QuantizedWeight, Spec, Tensors, checked_grid
from compressor.formats.positions import check_positions, compress24, expand24
from compressor.formats.sparse24 import meta_spec


@dataclass(frozen=True)
class Sparse24Int8(Format):
    """`weight_packed` [O, I / 2] int8, `weight_meta` [O, ceil(I / 8)] uint8, `weight_scale` [O, G]."""

    name: ClassVar[str] = "sparse24_int8"
    sparse: ClassVar[bool] = True
    grid: ClassVar[tuple[int, int]] = (-127, 127)
    scaled: ClassVar[bool] = True
    largest: ClassVar[float] = 127

    def spec(self, out_features: int, in_features: int) -> Spec:
        self.check(out_features, in_features)
        return {
            "weight_packed": ((out_features, in_features // 2), torch.int8),
            **meta_spec(out_features, in_features),
            "weight_scale": ((out_features, self.groups(in_features)), self.dtype),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        self.check(*weight.values.shape)
        kept, meta = compress24(checked_grid(weight.values, self.grid))
        scale = self.checked_scale(weight)
        return {"weight_packed": kept, "weight_meta": meta, "weight_scale": scale}

    def unpack_quantized(self, tensors: Tensors) -> QuantizedWeight:
        return QuantizedWeight(expand24(tensors["weight_packed"], tensors["weight_meta"]), tensors["weight_scale"])

    def shape_of(self, tensors: Tensors) -> tuple[int, int]:
        out_features, half = tensors["weight_packed"].shape
        return out_features, 2 * half

    def validate(self, tensors: Tensors) -> None:
        super().validate(tensors)
        check_positions(tensors["weight_meta"])
