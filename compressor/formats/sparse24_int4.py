"""`sparse24_int4`: 2:4 sparse 4-bit values: 2 bits a weight, 1 bit for positions, and the scales.

At group 128 with bf16 scales that is 3.125 bits a weight, at group 64 3.25.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.formats.format import Format, QuantizedWeight, Spec, Tensors, checked_grid
from compressor.formats.nibbles import pack_nibbles, unpack_nibbles
from compressor.formats.positions import check_positions, compress24, expand24
from compressor.formats.sparse24 import meta_spec


@dataclass(frozen=True)
class Sparse24Int4(Format):
    """`weight_packed` [O, I / 4] uint8 (a byte for both kept values), `weight_meta`, `weight_scale` [O, G]."""

    name: ClassVar[str] = "sparse24_int4"
    sparse: ClassVar[bool] = True
    grid: ClassVar[tuple[int, int]] = (-8, 7)
    scaled: ClassVar[bool] = True
    largest: ClassVar[float] = 8

    def spec(self, out_features: int, in_features: int) -> Spec:
        self.check(out_features, in_features)
        return {
            "weight_packed": ((out_features, in_features // 4), torch.uint8),
            **meta_spec(out_features, in_features),
            "weight_scale": ((out_features, self.groups(in_features)), self.dtype),
        }

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        self.check(*weight.values.shape)
        kept, meta = compress24(checked_grid(weight.values, self.grid))
        scale = self.checked_scale(weight)
        return {"weight_packed": pack_nibbles(kept), "weight_meta": meta, "weight_scale": scale}

    def unpack_quantized(self, tensors: Tensors) -> QuantizedWeight:
        values = expand24(unpack_nibbles(tensors["weight_packed"]), tensors["weight_meta"])
        return QuantizedWeight(values, tensors["weight_scale"])

    def shape_of(self, tensors: Tensors) -> tuple[int, int]:
        out_features, quarter = tensors["weight_packed"].shape
        return out_features, 4 * quarter

    def validate(self, tensors: Tensors) -> None:
        super().validate(tensors)
        check_positions(tensors["weight_meta"])
