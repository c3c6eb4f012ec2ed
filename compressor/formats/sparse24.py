"""`sparse24`: 2:4 sparse values in bf16 or fp16: 8 bits a weight and 1 bit for positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.formats.format import Format, QuantizedWeight, Spec, Tensors, checked_floats
from compressor.formats.positions import check_positions, compress24, expand24


def meta_spec(out_features: int, in_features: int) -> Spec:
    """The positions that all sparse formats store."""
    return {"weight_meta": ((out_features, -(-in_features // 8)), torch.uint8)}


@dataclass(frozen=True)
class Sparse24(Format):
    """`weight_packed` [O, I / 2] in `dtype`, `weight_meta` [O, ceil(I / 8)] uint8."""

    name: ClassVar[str] = "sparse24"
    sparse: ClassVar[bool] = True

    def spec(self, out_features: int, in_features: int) -> Spec:
        self.check(out_features, in_features)
        packed = ((out_features, in_features // 2), self.dtype)
        return {"weight_packed": packed, **meta_spec(out_features, in_features)}

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        self.check(*weight.values.shape)
        kept, meta = compress24(checked_floats(weight.dequantized(), self.dtype))
        return {"weight_packed": kept, "weight_meta": meta}

    def unpack(self, tensors: Tensors) -> Tensor:
        return expand24(tensors["weight_packed"], tensors["weight_meta"])

    def unpack_quantized(self, tensors: Tensors) -> QuantizedWeight:
        return QuantizedWeight(self.unpack(tensors))

    def shape_of(self, tensors: Tensors) -> tuple[int, int]:
        out_features, half = tensors["weight_packed"].shape
        return out_features, 2 * half

    def validate(self, tensors: Tensors) -> None:
        super().validate(tensors)
        check_positions(tensors["weight_meta"])
